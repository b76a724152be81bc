"""Stable Diffusion 3 and 3.5: a transformer on latents, with states of three text encoders in one sequence."""

from collections.abc import Mapping
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from distill.networks.smaller import spaced
from distill.protocols import Cond
from distill.teachers.convention import CondField, Convention, size_of
from distill.teachers.read import Config, Read, Size, checked


class _Config(Read):
    sample_size: Size = 128
    patch_size: Size = 2
    in_channels: Size = 16
    out_channels: Size | None = 16
    attention_head_dim: Size = 64
    num_attention_heads: Size = 18
    joint_attention_dim: Size = 4096
    pooled_projection_dim: Size = 2048
    pos_embed_max_size: Size = 96

    @property
    def channels(self) -> int:
        return self.out_channels or self.in_channels


class StableDiffusion3(Convention):
    title = "Stable Diffusion 3, 3.5"
    networks = ("SD3Transformer2DModel",)
    pipelines = ("StableDiffusion3Pipeline",)
    prediction = "velocity"
    guidance_scale = 7.0
    image_output = 1
    size_options = ("num_layers", "num_attention_heads", "attention_head_dim", "dual_attention_layers")
    width_options = ("caption_projection_dim",)

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        own = checked(_Config, config, path)
        default = (own.sample_size, own.sample_size)
        return (own.channels, *size_of(latent, default, path, own.patch_size, own.pos_embed_max_size))

    def fields(self, config: Config) -> Mapping[str, CondField]:
        own = _Config.model_validate(config)
        return {
            "encoder_hidden_states": CondField((None, own.joint_attention_dim)),
            "pooled_projections": CondField((own.pooled_projection_dim,)),
        }

    def resized(self, config: Config, changes: Config) -> Config:
        """A block has a second attention if the block has it that it starts from."""
        found = super().resized(config, changes)
        if not config.get("dual_attention_layers") or "dual_attention_layers" in changes:
            return found
        origins = spaced(found["num_layers"], config["num_layers"])
        second = tuple(i for i, origin in enumerate(origins) if origin in config["dual_attention_layers"])
        return {**found, "dual_attention_layers": second}

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        output: Tensor = network(
            hidden_states=x_t,
            timestep=time,
            encoder_hidden_states=cond["encoder_hidden_states"],
            pooled_projections=cond["pooled_projections"],
            return_dict=False,
        )[0]
        return output

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        states, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}


ARCHITECTURE = StableDiffusion3()
