"""AuraFlow: a transformer on latents, with states of UMT5 that are zero after the end of the prompt."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from distill.protocols import Cond
from distill.teachers.convention import CondField, Convention, size_of
from distill.teachers.read import Config, Read, Size, checked


class _Config(Read):
    patch_size: Size = 2
    in_channels: Size = 4
    out_channels: Size = 4
    attention_head_dim: Size = 256
    num_attention_heads: Size = 12
    joint_attention_dim: Size = 2048
    pos_embed_max_size: Size = 1024  # of a square grid


class AuraFlow(Convention):
    title = "AuraFlow"
    networks = ("AuraFlowTransformer2DModel",)
    pipelines = ("AuraFlowPipeline",)
    prediction = "velocity"
    guidance_scale = 3.5
    image_output = 1
    size_options = ("num_mmdit_layers", "num_single_dit_layers", "num_attention_heads", "attention_head_dim")
    width_options = ("caption_projection_dim",)

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        own = checked(_Config, config, path)
        patches = math.isqrt(own.pos_embed_max_size)
        side = min(128, patches * own.patch_size)
        return (own.out_channels, *size_of(latent, (side, side), path, own.patch_size, patches))

    def fields(self, config: Config) -> Mapping[str, CondField]:
        return {"encoder_hidden_states": CondField((None, _Config.model_validate(config).joint_attention_dim))}

    def time_layers(self, network: nn.Module) -> Sequence[str]:
        return ["time_step_proj"]

    def image_tokens(self, network: nn.Module, x_t: Tensor) -> int | None:
        patch = _Config.model_validate(network.config).patch_size
        return x_t.shape[-2] // patch * (x_t.shape[-1] // patch)

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        output: Tensor = network(
            hidden_states=x_t,
            timestep=time / 1000,
            encoder_hidden_states=cond["encoder_hidden_states"],
            return_dict=False,
        )[0]
        return output

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": pipeline.encode_prompt(prompt=prompts, do_classifier_free_guidance=False)[0]}


ARCHITECTURE = AuraFlow()
