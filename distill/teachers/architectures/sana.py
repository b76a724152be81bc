"""Sana: a transformer with linear attention on latents that are 32 times smaller than images."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.protocols import Cond
from distill.teachers.convention import CondField, Convention, size_of
from distill.teachers.read import Config, Read, Side, Size, checked

TOKENS = 300  # of a prompt


class _Config(Read):
    in_channels: Size = 32
    out_channels: Size | None = 32
    num_attention_heads: Size = 70
    attention_head_dim: Size = 32
    caption_channels: Size = 2304
    sample_size: Side = 32
    patch_size: Size = 1
    guidance_embeds: bool = False


class Sana(Convention):
    title = "Sana"
    networks = ("SanaTransformer2DModel",)
    pipelines = ("SanaPipeline",)
    prediction = "velocity"
    guidance_scale = 4.5
    default_factors = (1, 32)
    size_options = (
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "num_cross_attention_heads",
        "cross_attention_head_dim",
        "mlp_ratio",
    )
    width_options = ("cross_attention_dim",)

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        own = checked(_Config, config, path)
        if own.guidance_embeds:
            raise InputError(
                f"{path}: guidance_embeds=true: this network was distilled (Sana Sprint), and its output is not the "
                "velocity of its data; valid: teachers with guidance_embeds=false"
            )
        channels = own.out_channels or own.in_channels
        if channels != own.in_channels:
            raise InputError(f"{path}: in_channels={own.in_channels}, out_channels={channels}; valid: equal numbers")
        return (channels, *size_of(latent, (own.sample_size, own.sample_size), path, patch=own.patch_size))

    def fields(self, config: Config) -> Mapping[str, CondField]:
        return {
            "encoder_hidden_states": CondField((None, _Config.model_validate(config).caption_channels)),
            "encoder_attention_mask": CondField((None,), torch.int64),
        }

    def time_layers(self, network: nn.Module) -> Sequence[str]:
        return ["time_embed.emb.timestep_embedder"]

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        output: Tensor = network(
            x_t,
            encoder_hidden_states=cond["encoder_hidden_states"],
            encoder_attention_mask=cond["encoder_attention_mask"],
            timestep=time * network.config["timestep_scale"],
            return_dict=False,
        )[0]
        return output

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        """After the pipeline's own instruction, of which the first token is kept."""
        instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        return self._encoded(pipeline, prompts, instruction)

    def encode_null(self, pipeline: DiffusionPipeline, negative: str) -> dict[str, Tensor]:
        """Without the instruction."""
        return self._encoded(pipeline, [negative], None)

    def _encoded(
        self, pipeline: DiffusionPipeline, prompts: list[str], instruction: list[str] | None
    ) -> dict[str, Tensor]:
        states, mask, _, _ = pipeline.encode_prompt(
            prompts, False, max_sequence_length=TOKENS, complex_human_instruction=instruction
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


ARCHITECTURE = Sana()
