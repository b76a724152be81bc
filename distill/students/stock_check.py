"""Checks exported students in plain diffusers, where distill cannot be imported: their weights, and their samples."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.core.errors import RunError
from distill.core.field_types import middle
from distill.exchange.student_card import StudentCard
from distill.flow.conditioning import GUIDANCE_SCALE, embeds_guidance
from distill.flow.draws import sample_noise
from distill.networks.experts import Experts
from distill.protocols import Cond
from distill.students import isolated, native, native_folder, stock_program, with_code
from distill.students.native import NativeStudent
from distill.students.sampling import by_sampler, fresh_noises, grid, num_fresh, usual_grid
from distill.students.stock import Stock
from distill.teachers.checkpoint import TeacherCheckpoint
from distill.teachers.codecs import LatentCodec, pixel_size
from distill.teachers.conditions import planned
from distill.teachers.convention import Asked, Convention
from distill.teachers.read import Config

PROGRAM = inspect.getsource(stock_program)
SEED = 0
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # largest difference of latents, relative to their largest value
PACKING = {  # form of latents in the loop of a pipeline, if it is not [B, C, ...]
    "FluxPipeline": "patches",
    "ChromaPipeline": "patches",
    "QwenImagePipeline": "patches",
    "LTXPipeline": "patches of videos",
    "Flux2Pipeline": "tokens",
    "Flux2KleinPipeline": "tokens",
}
ARGUMENTS = {  # tensor of a condition -> argument of a pipeline; a pipeline computes the others itself
    "encoder_hidden_states": "prompt_embeds",
    "encoder_hidden_states_t5": "prompt_embeds_2",
    "cap_feats": "prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
    "text_embeds": "pooled_prompt_embeds",
    "encoder_attention_mask": "prompt_attention_mask",
    "attention_mask": "prompt_attention_mask",
    "text_embedding_mask": "prompt_attention_mask",
    "text_embedding_mask_t5": "prompt_attention_mask_2",
    "encoder_hidden_states_mask": "prompt_embeds_mask",
}
LISTS = {"cap_feats"}  # the argument is a list with one tensor for each prompt
SIDES = ("num_frames", "height", "width")


@dataclass(frozen=True)
class CheckedStudent:
    """A student in the data type of its export, and how the stock pipeline samples it."""

    student: NativeStudent
    found: TeacherCheckpoint
    card: StudentCard
    how: Stock
    dtype: str  # float32 or bfloat16

    @property
    def convention(self) -> Convention:
        assert isinstance(self.found.architecture, Convention), "only these students have a stock pipeline"
        return self.found.architecture

    @property
    def config(self) -> Config:
        base = native.base_of(self.student.network)
        return dict((base.transformer if isinstance(base, Experts) else base).config)

    @property
    def steps(self) -> list[int]:
        """The numbers of steps for which samples are compared: the two smallest ones."""
        return sorted(self.how.steps or (1, 2))[:2]


def check(each: CheckedStudent, folder: Path, pipeline: str, *, whole: bool) -> None:
    """RunError unless plain diffusers loads the same weights from the folder and, if `whole`, makes the same samples.

    pipeline: name of the pipeline class. whole: the folder is a complete pipeline.
    """
    x, cond, size = _small(each)
    fresh = {n: fresh_noises(SEED, [0], tuple(x.shape[1:]), num_fresh(each.card.sampler, n)) for n in each.steps}
    inputs = {"noise": x, **{f"cond/{ARGUMENTS[name]}": value for name, value in cond.items() if name in ARGUMENTS}}
    inputs |= {f"fresh@{count}": torch.stack(noises) for count, noises in fresh.items() if noises}
    parts = dict(native_folder.networks(each.student.network if whole else native.base_of(each.student.network)))
    steps = each.steps if whole else []
    arguments = {
        "folder": str(folder.absolute()),
        "whole": whole,
        "has_code": with_code.is_needed(each.how, each.student.network),
        "dtype": each.dtype,
        "networks": {name: type(part).__name__ for name, part in parts.items()},
        "steps": steps,
        "packing": PACKING.get(pipeline, ""),
        "lists": [f"cond/{ARGUMENTS[name]}" for name in cond if name in LISTS],
        "guidance": dict(each.how.arguments),
        "call": {
            **dict(zip(SIDES[-len(size) :], size, strict=True)),
            "use_resolution_binning": False,
            "negative_prompt": None,
            "class_labels": cond["class_labels"].tolist() if "class_labels" in cond else None,
        },
    }
    try:
        outputs = isolated.run(PROGRAM, inputs, arguments)
    except RunError as error:
        raise RunError(f"verification failed: {error}; nothing was kept") from error
    _compare_weights(parts, outputs)
    for count in steps:
        _compare_samples(each, count, x, cond, fresh[count], outputs)


def size_of(each: CheckedStudent, shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The size of samples in pixels, ([frames,] height, width). shape: of their latents; None: that of the student."""
    codec, latent = each.found.codec, (shape or each.card.shape)[1:]
    return pixel_size(latent, codec.factors if isinstance(codec, LatentCodec) else each.convention.default_factors)


def _small(each: CheckedStudent) -> tuple[Tensor, Cond, tuple[int, ...]]:
    """(noise [1, ...], its condition, size in pixels) of a sample that is as small as the network allows."""
    found, convention, config = each.found, each.convention, each.config
    fields = convention.fields(config)
    shape = convention.small(config, found.shape) if fields else found.shape  # without a prompt: squares of one size
    size = size_of(each, shape)
    if not fields:
        return sample_noise(SEED, [0], shape), found.conditioning.collate(torch.zeros(1, dtype=torch.int64)), size
    constants = convention.constants(config, Asked(size, embedded_guidance=found.packaging.embedded_guidance))
    rows = planned({name: one for name, one in fields.items() if name not in constants}, 1).null_rows
    assert rows is not None, "planned conditions have one"
    noise = sample_noise(SEED, [0], shape)
    noise = noise.bfloat16().float() if each.dtype == "bfloat16" else noise
    return noise, {**rows, **{name: value[None] for name, value in constants.items()}}, size


def _compare_weights(parts: dict[str, nn.Module], outputs: dict[str, Tensor]) -> None:
    digests = {
        f"{name}/{key}": stock_program.sha256(weight)
        for name, part in parts.items()
        for key, weight in part.state_dict().items()
    }
    for name, digest in digests.items():
        if name not in outputs or not torch.equal(digest, outputs[name]):
            raise RunError(f"verification failed: diffusers loads another {name} than was written; nothing was kept")
    if more := [name for name in outputs if "/" in name and name not in digests]:
        raise RunError(f"verification failed: diffusers has {more[0]}, which was not written; nothing was kept")


@torch.no_grad()
def _compare_samples(
    each: CheckedStudent, steps: int, noise: Tensor, cond: Cond, fresh: Sequence[Tensor], outputs: dict[str, Tensor]
) -> None:
    card, theirs = each.card, outputs[f"latents@{steps}"]
    if not each.convention.fields(each.config):
        noise = outputs[f"first@{steps}"]  # these pipelines draw it themselves
    if card.guidance_range is not None and not embeds_guidance(each.found.conditioning):
        cond = {**cond, GUIDANCE_SCALE: torch.full((len(noise),), middle(card.guidance_range))}
    times = grid(card.t_grids, steps) if card.t_grids else usual_grid(each.student, card.sampler, steps)
    ours = by_sampler(each.student, card.sampler, noise, times, cond, fresh).float()
    largest = ours.abs().max().item()
    error = (ours - theirs).abs().max().item()
    if not (math.isfinite(largest) and error <= TOLERANCE[each.dtype] * largest):  # also true for NaN
        raise RunError(
            f"verification failed: at {steps} step{'s' if steps > 1 else ''}, the pipeline of diffusers makes other "
            f"latents than distill from the same noise: largest difference {error:.3g}, allowed "
            f"{TOLERANCE[each.dtype]:g} of the largest value {largest:.3g}; nothing was kept"
        )
