"""Conventions: how the networks of a family of latent-space pipelines are called, and with what.

A module of `architectures` defines a subclass of `Convention` for one family of networks. Its methods do what the loop
of that family's pipeline in diffusers does; the tests compare both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.flow.conditioning import ConditionTable, of_classes
from distill.flow.guidance import Combine, cfg
from distill.protocols import Cond, Conditioning, LayerOutput
from distill.teachers.conditions import ConditionFile
from distill.teachers.read import Config, short

Weights = Mapping[str, Tensor]
Recompute = Callable[..., object]  # (block, *inputs) -> the output of the block


@dataclass(frozen=True)
class CondField:
    """One tensor of a condition: its shape for one sample, in which None is the number of tokens of a prompt.

    All tensors of a condition have the same number of tokens.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Asked:
    """What the spec of a teacher says about the calls of its network.

    size: of the samples in pixels, (height, width) or (frames, height, width). is_student: whether this package has
    exported it; such a folder has no conditions, because they are those of its teacher.
    """

    size: tuple[int, ...]
    conditions: ConditionFile | None = None
    embedded_guidance: float | None = None
    null_class: int | None = None
    is_student: bool = False


class Convention:
    """How the networks of one family are called: a `protocols.Architecture` whose size and conditions the spec gives.

    The defaults are those of a network that is conditioned on text and guided by classifier-free guidance.
    """

    title = ""  # the models that are called like this, for tables
    networks: tuple[str, ...] = ()  # network classes of diffusers; they are imported only when they are used
    folder = "transformer"  # of the network in a pipeline
    pipelines: tuple[str, ...] = ()  # pipeline classes of diffusers whose network is called like this
    scheduler: Config = {}  # options that the scheduler must have, because the call of the network depends on them
    prediction = ""  # what `call` returns, for tables: that of the scheduler, or "velocity"
    conditions = "text"  # what the network is conditioned on, for tables
    combine: Combine = staticmethod(cfg)  # how the pipeline combines two velocities for guidance
    guidance_scale = 1.0  # the pipeline's default, in u + scale (c - u), where u is the velocity without condition
    embedded_guidance: float | None = None  # the pipeline's default; None: the network does not take it
    # How the pipeline calls its scheduler: "steps": with the number of steps N; "sigmas": with the times 1, ..., 1/N;
    # "timesteps": with N whole timesteps from the first to the last of its table.
    passes: Literal["steps", "sigmas", "timesteps"] = "steps"
    image_output = 0  # which part of what a block returns belongs to the image, if it returns a tuple

    size_options: tuple[str, ...] = ("num_layers", "num_attention_heads", "attention_head_dim")
    """the options of the config that make a network larger or smaller without changing its inputs and outputs"""
    width_options: tuple[str, ...] = ()
    """the options that must be num_attention_heads * attention_head_dim"""

    default_factors = (1, 8)  # without an autoencoder: how many frames, and pixels per side, become one

    @property
    def classes(self) -> tuple[type[nn.Module], ...]:
        return tuple(getattr(diffusers, name) for name in self.networks)

    def check_scheduler(self, config: Config, path: Path) -> None:
        """InputError unless this scheduler config has the options in `scheduler`, or leaves them out."""
        for name, valid in self.scheduler.items():
            if (found := config.get(name)) is not None and found != valid:
                raise InputError(
                    f"{path}: {name}={short(repr(found))}; valid for {self.title}: {valid!r}, because the times with "
                    "which its pipeline calls the network depend on it, and other values are not supported"
                )

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        """Shape of one sample as solvers and recipes hold it, [C, h, w] or [C, F, h, w].

        latent: (h, w) or (F, h, w) of the size that the spec asks for; None: the default size of the network.
        """
        raise NotImplementedError

    def small(self, config: Config, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the sample with which the network is tested: a few patches, and two frames of a video.

        shape: of its samples, as `latent_shape` gives it. It must take both, or neither: sides keep their remainders.
        """
        frames, patch = sides_of_patch(config)
        steps = [frames, 2 * patch, 2 * patch][4 - len(shape) :]  # twice a patch, because latents may be packed 2x2
        least = [2 * frames, 8 * patch, 8 * patch][4 - len(shape) :]
        sides = zip(shape[1:], steps, least, strict=True)
        return (shape[0], *(side if side <= few else few + (side - few) % step for side, step, few in sides))

    def fields(self, config: Config) -> Mapping[str, CondField]:
        """The tensors of a condition, by the name of the network's argument."""
        return {}

    def constants(self, config: Config, asked: Asked) -> dict[str, Tensor]:
        """Tensors of a condition that are the same for all samples, without the dimension of the batch."""
        return {}

    def of_sizes(self, sizes: Tensor) -> dict[str, Tensor]:
        """Those of `constants` that depend on the sizes of images [B, 6] (see `protocols.Conditioning`), each [B, ...].

        It may return tensors that `constants` leaves out for some networks.
        """
        return {}

    def conditioning(self, config: Config, path: Path, asked: Asked) -> Conditioning:
        """What the network is conditioned on. InputError if the spec does not give what the network needs."""
        if not (fields := self.fields(config)):
            return of_classes(None, None)
        if asked.conditions is None:
            todo = (
                "the spec must have a cache stage, if its data has captions or prompts (first in stages: cache: {kind: "
                "cache}) that stores prompts, or teacher.conditions must be set: a file with embeddings of prompts"
            )
            if asked.is_student:
                todo = (
                    "a file with embeddings of prompts must be given, as for its teacher: on the command line with "
                    "--teacher '{path: TEACHER, conditions: FILE}', in a spec as teacher.conditions"
                )
            raise InputError(
                f"{path}: this network is conditioned on {', '.join(fields)}, so {todo}; `distill encode TEACHER "
                "PROMPTS.txt` makes one"
            )
        constants = self.constants(config, asked)
        given = asked.conditions
        if asked.null_class is not None:
            raise InputError(
                f"teacher.null_class={asked.null_class} has no effect: this network ({path}) is conditioned on "
                "prompts, not on classes; remove it"
            )
        if asked.embedded_guidance is not None and "guidance" not in constants:
            raise InputError(
                f"teacher.embedded_guidance has no effect: this network ({path}) does not take the guidance scale as "
                "an input; remove it"
            )
        if asked.embedded_guidance is not None and "guidance" in given.rows.fields:
            raise InputError(
                f"teacher.embedded_guidance={asked.embedded_guidance:g} has no effect: {given.path} has the guidance "
                "scale of each row, in its field `guidance`; remove one of both"
            )
        given.check(fields, constants)
        return ConditionTable(
            given.rows,
            given.null_rows,
            {name: each for name, each in constants.items() if name not in given.rows.fields},
            {name: each.dtype for name, each in {**constants, **fields}.items()},
            self.of_sizes,
            given.prompts,
        )

    def pipeline_of(self, config: Config) -> str:
        """The pipeline class for a network whose folder does not name one."""
        return self.pipelines[0]

    def unguided(self, config: Config, *, whole: bool) -> Mapping[str, float]:
        """The arguments with which the pipeline makes one call per step, without guidance; empty: that is its default.

        whole: it is the pipeline of an exported student, with its network and its model_index.json; else it is the
        teacher's, with the LoRA of a student.
        """
        return {"guidance_scale": 1.0}

    def scale_of(self, config: Config) -> float:
        """`guidance_scale`, or the default for the variant that this config describes."""
        return self.guidance_scale

    def layers(self, network: nn.Module) -> Sequence[str]:
        """The names of the blocks, whose outputs are features."""
        return [
            name
            for name, _ in network.named_modules()
            if name.partition(".")[0].endswith("blocks") and name.count(".") == 1
        ]

    def time_layers(self, network: nn.Module) -> Sequence[str]:
        """The names of the modules that embed the time as [B, `time_width`]; a second time is added to their output."""
        return ["time_text_embed"]

    def time_width(self, config: Config) -> int:
        """The channels of what these modules make. config: of the network, with all defaults."""
        width: int = config["num_attention_heads"] * config["attention_head_dim"]
        return width

    def resized(self, config: Config, changes: Config) -> Config:
        """The config of a network of another size: with `changes` to `size_options`, and what follows from them."""
        found = {**config, **changes}
        if not self.width_options:
            return found
        return {
            **found,
            **dict.fromkeys(self.width_options, found["num_attention_heads"] * found["attention_head_dim"]),
        }

    def with_velocity(self, config: Config) -> Config:
        """The config of a network that takes (x_t, velocity), joined along the channels, in place of x_t."""
        channels = config["in_channels"]
        return {**config, "in_channels": 2 * channels, "out_channels": config.get("out_channels") or channels}

    def widened(self, config: Config, weights: Weights, wider: Weights) -> dict[str, Tensor]:
        """Weights for the network of `with_velocity` with which it computes the same as the network, for any velocity.

        config, weights: of the network. wider: weights of the network of `with_velocity`, for their shapes.
        """
        return {
            name: weight if weight.shape == wider[name].shape else torch.cat([weight, torch.zeros_like(weight)], dim=1)
            for name, weight in weights.items()  # another shape: the layer that reads x_t, [out, in, ...]
        }

    def critic_layer(self, network: nn.Module) -> str:
        """The name of the block whose output a discriminator looks at: the one in the middle."""
        names = self.layers(network)
        return names[len(names) // 2]

    def critic_width(self, config: Config) -> int:
        """The channels of the output of `critic_layer`, [B, tokens, width] or [B, width, ...]."""
        return self.time_width(config)

    def image_tokens(self, network: nn.Module, x_t: Tensor) -> int | None:
        """The tokens of one image, if blocks return those of the prompt before them; None: they return no others."""
        return None

    def of_image(self, network: nn.Module, output: LayerOutput, x_t: Tensor, cond: Cond) -> Tensor:
        """What belongs to the image in the output of a block, [B, tokens, width] or [B, width, ...].

        So features depend neither on the padding of a prompt nor on the other rows of the batch.
        """
        features = output if isinstance(output, Tensor) else output[self.image_output]
        assert isinstance(features, Tensor)
        count = self.image_tokens(network, x_t)
        return features if count is None else features[:, -count:]

    def settled(self, network: nn.Module) -> None:
        """Turns off what is random in a network's train() mode, other than dropout of features."""

    def for_pipeline(self, network: nn.Module) -> None:
        """Changes a network that is about to be exported such that its pipeline does not guide it by default."""

    def from_pipeline(self, network: nn.Module, path: Path) -> None:
        """Takes back `for_pipeline` in a network that was loaded. path: of its config, for messages.

        Raises InputError if it cannot be taken back, because the network is of another kind.
        """

    def recomputing(self, network: nn.Module, checkpoint: Recompute) -> Recompute:
        """How the network calls its blocks if their activations are recomputed in the backward pass.

        checkpoint: computes block(*inputs), and recomputes it from the same inputs.
        """
        return checkpoint

    def unused(self, network: nn.Module) -> Sequence[str]:
        """The names of the modules that have no effect on the output, and are not trained."""
        return ()

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """The network's prediction, like x_t [B, C, ...], which may have twice as many channels (see `with_velocity`).

        time: [B], n of a VP schedule, N times the time of the linear path, or c_noise of EDM.
        """
        raise NotImplementedError

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        """The rows of conditions of prompts, in the pipeline's own way. "" is the prompt of the unconditional call."""
        raise NotImplementedError

    def encode_null(self, pipeline: DiffusionPipeline, negative: str) -> dict[str, Tensor]:
        """The row of the unconditional call, or of a negative prompt."""
        return self.encode(pipeline, [negative])


def sides_of_patch(config: Config) -> tuple[int, int]:
    """Frames and positions per side of a patch, as the config of a transformer gives them; 1 where it does not."""
    patch = config.get("patch_size") or 1
    frames, side = (config.get("patch_size_t") or 1, patch) if isinstance(patch, int) else (patch[0], patch[-1])
    return frames, side


def size_of(
    latent: tuple[int, ...] | None, default: tuple[int, ...], path: Path, patch: int = 1, most: int | None = None
) -> tuple[int, ...]:
    """`latent`, or the default. InputError if it has another number of sides, or is no multiple of the patch size.

    most: the number of patches per side for which the network has positions; InputError if there are more.
    """
    found = default if latent is None else latent
    if len(found) != len(default):
        words = "[height, width]" if len(default) == 2 else "[frames, height, width]"
        raise InputError(
            f"teacher.size: this network ({path}) makes samples of size {words}; give {len(default)} numbers"
        )
    if any(side % patch or side < patch for side in found[-2:]):
        raise InputError(
            f"teacher.size: height and width give latents of {found[-2]}x{found[-1]}, but the network ({path}) works "
            f"on patches of {patch}x{patch}; give other sides"
        )
    if most is not None and max(found[-2:]) > most * patch:
        raise InputError(
            f"teacher.size: height and width give latents of {found[-2]}x{found[-1]}, but the network ({path}) has "
            f"positions for {most * patch}x{most * patch}; give smaller sides"
        )
    return found


def embedded(asked: Asked, default: float) -> Tensor:
    """The guidance scale that a network takes as an input."""
    return torch.tensor(default if asked.embedded_guidance is None else asked.embedded_guidance)


def of_one_length(rows: Sequence[Tensor], length: int) -> Tensor:
    """Rows [L_i, ...] of different lengths as one tensor [B, length, ...], with zeros after the end of each."""
    return torch.stack([torch.cat([row, row.new_zeros(length - len(row), *row.shape[1:])]) for row in rows])
