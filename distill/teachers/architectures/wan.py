"""Wan: text to video on latents [C, F, h, w]. Wan 2.2 has two networks, one for the times with more noise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from diffusers import DiffusionPipeline
from pydantic import Field
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.networks.experts import Experts
from distill.protocols import Cond
from distill.teachers.convention import CondField, Convention, size_of
from distill.teachers.read import Config, Read, Size, checked

PATCH = (1, 2, 2)  # the pipeline works with these patches only
SMALL, LARGE = (21, 60, 104), (31, 44, 80)  # latents of 81x480x832 pixels, and of 121x704x1280 with Wan 2.2's own codec
CHANNELS_OF_LARGE = 48
TOKENS = 512  # of a prompt; shorter ones are filled up with zeros


class _Config(Read):
    patch_size: Annotated[Sequence[Size], Field(min_length=3, max_length=3)] = PATCH
    num_attention_heads: Size = 40
    attention_head_dim: Size = 128
    in_channels: Size = 16
    out_channels: Size | None = 16
    text_dim: Size = 4096
    image_dim: Size | None = None
    rope_max_seq_len: Size = 1024

    @property
    def channels(self) -> int:
        return self.out_channels or self.in_channels


class Wan(Convention):
    title = "Wan 2.1, 2.2 (text to video)"
    networks = ("WanTransformer3DModel",)
    pipelines = ("WanPipeline",)
    prediction = "velocity"
    guidance_scale = 5.0
    default_factors = (4, 8)
    size_options = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim")

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        own = checked(_Config, config, path)
        if own.image_dim is not None or own.in_channels != own.channels:
            raise InputError(
                f"{path}: in_channels={own.in_channels}, out_channels={own.channels}, image_dim={own.image_dim}: this "
                "network is also conditioned on an image (image to video), which is not supported; valid: networks of "
                "text to video, which have in_channels=out_channels and no image_dim"
            )
        if tuple(own.patch_size) != PATCH:
            raise InputError(f"{path}: patch_size={list(own.patch_size)}; valid: {list(PATCH)}")
        default = LARGE if own.channels == CHANNELS_OF_LARGE else SMALL
        frames, height, width = size_of(latent, default, path, patch=2, most=own.rope_max_seq_len)
        if frames > own.rope_max_seq_len:
            raise InputError(
                f"teacher.size: the number of frames gives latents of {frames} frames, but the network ({path}) has "
                f"positions for {own.rope_max_seq_len}; give fewer frames"
            )
        return (own.channels, frames, height, width)

    def fields(self, config: Config) -> Mapping[str, CondField]:
        return {"encoder_hidden_states": CondField((None, _Config.model_validate(config).text_dim))}

    def time_layers(self, network: nn.Module) -> Sequence[str]:
        return ["condition_embedder.time_embedder"]

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        # The pipeline of Wan 2.2 TI2V gives each token a time of its own (expand_timesteps). From text to video, these
        # are equal, and the network computes the same as with one time.
        if isinstance(network, Experts):
            return network.called(self.call, x_t, time, cond)
        output: Tensor = network(
            hidden_states=x_t, timestep=time, encoder_hidden_states=cond["encoder_hidden_states"], return_dict=False
        )[0]
        return output

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        # The default max_sequence_length of encode_prompt is not that of the pipeline.
        states, _ = pipeline.encode_prompt(
            prompt=prompts, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        return {"encoder_hidden_states": states}


ARCHITECTURE = Wan()
