"""LTX-Video: a transformer on the positions of a video, which it is given in seconds and pixels."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.protocols import Cond
from distill.teachers.convention import Asked, CondField, Convention, size_of
from distill.teachers.read import Config, Read, Size, checked

TOKENS = 128  # of a prompt
FRAME_RATE = 25.0  # the pipeline's default


class _Config(Read):
    in_channels: Size = 128
    out_channels: Size | None = 128
    patch_size: Size = 1
    patch_size_t: Size = 1
    num_attention_heads: Size = 32
    attention_head_dim: Size = 64
    caption_channels: Size = 4096

    @property
    def channels(self) -> int:
        return self.out_channels or self.in_channels


class Ltx(Convention):
    """A file of conditions may also have the `frame_rate` of each row, in frames per second."""

    title = "LTX-Video"
    networks = ("LTXVideoTransformer3DModel",)
    pipelines = ("LTXPipeline",)
    prediction = "velocity"
    passes = "sigmas"
    guidance_scale = 3.0
    default_factors = (8, 32)
    width_options = ("cross_attention_dim",)

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        own = checked(_Config, config, path)
        if (own.patch_size, own.patch_size_t) != (1, 1):
            raise InputError(f"{path}: patch_size={own.patch_size}, patch_size_t={own.patch_size_t}; valid: 1 and 1")
        return (own.channels, *size_of(latent, (21, 16, 22), path))

    def fields(self, config: Config) -> Mapping[str, CondField]:
        return {
            "encoder_hidden_states": CondField((None, _Config.model_validate(config).caption_channels)),
            "encoder_attention_mask": CondField((None,), torch.bool),
        }

    def constants(self, config: Config, asked: Asked) -> dict[str, Tensor]:
        return {"frame_rate": torch.tensor(FRAME_RATE), "video_size": torch.tensor(asked.size)}

    def time_layers(self, network: nn.Module) -> Sequence[str]:
        return ["time_embed.emb.timestep_embedder"]

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        frames, height, width = x_t.shape[2:]
        pixels = cond["video_size"].float().unbind(1)  # frames, height, width, each [B]
        # How many seconds, and how many pixels, one position covers. The first frame of a video has one of its own.
        covered = (
            (pixels[0] - 1) / max(frames - 1, 1) / cond["frame_rate"].float(),
            pixels[1] / height,
            pixels[2] / width,
        )
        output: Tensor = network(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            encoder_hidden_states=cond["encoder_hidden_states"],
            timestep=time,
            encoder_attention_mask=cond["encoder_attention_mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=tuple(each.reshape(-1, 1, 1, 1, 1) for each in covered),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, (frames, height, width))

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        states, mask, _, _ = pipeline.encode_prompt(
            prompt=prompts, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


ARCHITECTURE = Ltx()
