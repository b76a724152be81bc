"""FLUX.2: a transformer on latents whose 2x2 patches are channels. dev takes the guidance scale as an input."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from distill.flow.packing import grid_ids
from distill.protocols import Cond
from distill.teachers.convention import Asked, CondField, Convention, embedded, size_of
from distill.teachers.read import Config, Read, Size, checked


class _Config(Read):
    in_channels: Size = 128
    out_channels: Size | None = None
    joint_attention_dim: Size = 15360
    num_attention_heads: Size = 48
    attention_head_dim: Size = 128
    guidance_embeds: bool = True

    @property
    def channels(self) -> int:
        return self.out_channels or self.in_channels


class Flux2(Convention):
    title = "FLUX.2 dev, klein"
    networks = ("Flux2Transformer2DModel",)
    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline")
    prediction = "velocity"
    passes = "sigmas"
    guidance_scale = 1.0  # of dev, whose guidance is embedded; klein is guided with 4, unless it is distilled
    embedded_guidance = 4.0
    image_output = 1
    default_factors = (1, 16)
    size_options = ("num_layers", "num_single_layers", "num_attention_heads", "mlp_ratio")

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        return (checked(_Config, config, path).channels, *size_of(latent, (64, 64), path))

    def fields(self, config: Config) -> Mapping[str, CondField]:
        return {"encoder_hidden_states": CondField((None, _Config.model_validate(config).joint_attention_dim))}

    def constants(self, config: Config, asked: Asked) -> dict[str, Tensor]:
        if not _Config.model_validate(config).guidance_embeds:
            return {}
        return {"guidance": embedded(asked, self.embedded_guidance)}

    def pipeline_of(self, config: Config) -> str:
        return self.pipelines[not _Config.model_validate(config).guidance_embeds]

    def unguided(self, config: Config, *, whole: bool) -> Mapping[str, float]:
        """The pipeline of klein does not guide networks if its model_index.json says is_distilled, as ours do."""
        guided = not _Config.model_validate(config).guidance_embeds and not whole
        return {"guidance_scale": 1.0} if guided else {}

    def time_layers(self, network: nn.Module) -> Sequence[str]:
        return ["time_guidance_embed"]

    def image_tokens(self, network: nn.Module, x_t: Tensor) -> int | None:
        return x_t.shape[-2] * x_t.shape[-1]

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        text, (height, width) = cond["encoder_hidden_states"], x_t.shape[-2:]
        # Positions are (image, row, column, token of the text).
        text_ids = torch.zeros(text.shape[1], 4, device=text.device)
        text_ids[:, 3] = torch.arange(text.shape[1], device=text.device)
        output: Tensor = network(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            timestep=time / 1000,
            guidance=cond.get("guidance"),
            encoder_hidden_states=text,
            txt_ids=text_ids,
            img_ids=nn.functional.pad(grid_ids(height, width, text_ids), (0, 1)),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, (height, width))

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": pipeline.encode_prompt(prompt=prompts)[0]}


ARCHITECTURE = Flux2()
