"""FLUX.1: a transformer on packed latents, with the time in [0, 1] and, in dev, the guidance scale as an input."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from distill.flow.packing import grid_ids, packed, unpacked
from distill.protocols import Cond
from distill.teachers.convention import Asked, CondField, Convention, embedded, size_of
from distill.teachers.read import Config, Read, Size, checked


class _Config(Read):
    in_channels: Size = 64
    out_channels: Size | None = None
    joint_attention_dim: Size = 4096
    pooled_projection_dim: Size = 768
    num_attention_heads: Size = 24
    attention_head_dim: Size = 128
    guidance_embeds: bool = False

    @property
    def channels(self) -> int:
        return self.out_channels or self.in_channels


class Flux(Convention):
    title = "FLUX.1 dev, schnell"
    networks = ("FluxTransformer2DModel",)
    pipelines = ("FluxPipeline",)
    prediction = "velocity"
    passes = "sigmas"
    guidance_scale = 1.0  # no second call; with a negative prompt there may be one ("true CFG")
    embedded_guidance = 3.5
    image_output = 1
    size_options = ("num_layers", "num_single_layers", "num_attention_heads")

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        channels = checked(_Config, config, path).channels
        return (channels // 4, *size_of(latent, (128, 128), path, patch=2))

    def fields(self, config: Config) -> Mapping[str, CondField]:
        own = _Config.model_validate(config)
        return {
            "encoder_hidden_states": CondField((None, own.joint_attention_dim)),
            "pooled_projections": CondField((own.pooled_projection_dim,)),
        }

    def constants(self, config: Config, asked: Asked) -> dict[str, Tensor]:
        if not _Config.model_validate(config).guidance_embeds:
            return {}
        return {"guidance": embedded(asked, self.embedded_guidance)}

    def unguided(self, config: Config, *, whole: bool) -> Mapping[str, float]:
        return {}

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        text, (height, width) = cond["encoder_hidden_states"], x_t.shape[-2:]
        output = network(
            hidden_states=packed(x_t),
            timestep=time / 1000,
            guidance=cond.get("guidance"),
            pooled_projections=cond["pooled_projections"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device, dtype=text.dtype),
            img_ids=grid_ids(height // 2, width // 2, text),
            return_dict=False,
        )[0]
        return unpacked(output, height, width)

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        states, pooled, _ = pipeline.encode_prompt(prompt=prompts, prompt_2=None)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}


ARCHITECTURE = Flux()
