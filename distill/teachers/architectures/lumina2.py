"""Lumina-Image 2.0: a transformer with time 1 - t and output -v, and guidance that keeps the norm of each row.

The pipeline's cfg_trunc_ratio, which leaves out guidance in the last steps, is `guidance.interval` of a spec.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from diffusers import DiffusionPipeline
from pydantic import Field
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.flow.guidance import TINY, cfg
from distill.protocols import Cond, LayerOutput
from distill.teachers.convention import CondField, Convention, Weights, size_of
from distill.teachers.read import Config, Read, Side, Size, checked

TOKENS = 256  # of a prompt
TIME_WIDTH = 1024  # at most


class _Config(Read):
    sample_size: Side = 128
    patch_size: Size = 2
    in_channels: Size = 16
    out_channels: Size | None = None
    hidden_size: Size = 2304
    cap_feat_dim: Size = 1024
    axes_lens: Annotated[Sequence[Size], Field(min_length=3, max_length=3)] = (300, 512, 512)

    @property
    def channels(self) -> int:
        return self.out_channels or self.in_channels


def per_row(x_t: Tensor, t: Tensor, v: Tensor, other: Tensor, scale: float) -> Tensor:
    """Guidance whose result is rescaled to the norm of v, per channel and row of positions."""
    precise = torch.promote_types(v.dtype, torch.float32)
    v = v.to(precise)
    guided = cfg(x_t, t, v, other.to(precise), scale)
    norm, norm_guided = (each.norm(dim=-1, keepdim=True) for each in (v, guided))
    return guided * (norm / norm_guided.clamp(min=TINY))


class Lumina2(Convention):
    title = "Lumina-Image 2.0"
    networks = ("Lumina2Transformer2DModel",)
    pipelines = ("Lumina2Pipeline",)
    scheduler: Config = {"num_train_timesteps": 1000}
    prediction = "velocity"
    passes = "sigmas"
    combine = staticmethod(per_row)
    guidance_scale = 4.0
    size_options = ("num_layers", "num_refiner_layers", "num_attention_heads", "num_kv_heads")

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        own = checked(_Config, config, path)
        default = (own.sample_size, own.sample_size)
        return (own.channels, *size_of(latent, default, path, own.patch_size, min(own.axes_lens[1:])))

    def fields(self, config: Config) -> Mapping[str, CondField]:
        return {
            "encoder_hidden_states": CondField((None, _Config.model_validate(config).cap_feat_dim)),
            "encoder_attention_mask": CondField((None,), torch.int64),
        }

    def layers(self, network: nn.Module) -> Sequence[str]:
        return [name for name, _ in network.named_modules() if name.startswith("layers.") and name.count(".") == 1]

    def time_layers(self, network: nn.Module) -> Sequence[str]:
        return ["time_caption_embed.timestep_embedder"]

    def time_width(self, config: Config) -> int:
        return min(_Config.model_validate(config).hidden_size, TIME_WIDTH)

    def critic_width(self, config: Config) -> int:
        return _Config.model_validate(config).hidden_size

    def resized(self, config: Config, changes: Config) -> Config:
        """The width of a head is that of its positions."""
        found = super().resized(config, changes)
        heads, shared = found["num_attention_heads"], found["num_kv_heads"]
        if heads % shared:
            raise InputError(f"num_attention_heads={heads} must be a multiple of num_kv_heads={shared}; change either")
        return {**found, "hidden_size": heads * sum(found["axes_dim_rope"])}

    def widened(self, config: Config, weights: Weights, wider: Weights) -> dict[str, Tensor]:
        """The channels are the last dimension of a patch."""
        name, patch = "x_embedder.weight", _Config.model_validate(config).patch_size
        read = weights[name].unflatten(1, (patch * patch, -1))
        return {**weights, name: torch.cat([read, torch.zeros_like(read)], dim=2).flatten(1)}

    def of_image(self, network: nn.Module, output: LayerOutput, x_t: Tensor, cond: Cond) -> Tensor:
        """The tokens of each image come after those of its own prompt, and the padding after both."""
        assert isinstance(output, Tensor)
        patch = _Config.model_validate(network.config).patch_size
        count, lengths = x_t.shape[-2] // patch * (x_t.shape[-1] // patch), cond["encoder_attention_mask"].sum(1)
        return torch.stack([row[length : length + count] for row, length in zip(output, lengths.tolist(), strict=True)])

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        output: Tensor = network(
            hidden_states=x_t,
            timestep=1 - time / 1000,
            encoder_hidden_states=cond["encoder_hidden_states"],
            encoder_attention_mask=cond["encoder_attention_mask"],
            return_dict=False,
        )[0]
        return -output

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        states, mask, _, _ = pipeline.encode_prompt(prompts, False, max_sequence_length=TOKENS)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def encode_null(self, pipeline: DiffusionPipeline, negative: str) -> dict[str, Tensor]:
        """Without the system prompt that precedes other prompts."""
        _, _, states, mask = pipeline.encode_prompt([""], True, negative_prompt=[negative], max_sequence_length=TOKENS)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


ARCHITECTURE = Lumina2()
