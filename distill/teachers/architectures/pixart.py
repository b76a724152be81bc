"""PixArt-alpha and PixArt-Sigma: transformers on latents that attend to the embedding of a prompt by T5."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from distill.protocols import Cond
from distill.teachers.architectures.dit import check_variance
from distill.teachers.convention import Asked, CondField, Convention, size_of
from distill.teachers.read import Config, Read, Side, Size, checked


class _Config(Read):
    sample_size: Side = 128
    patch_size: Size = 2
    in_channels: Size = 4
    out_channels: Size | None = 8
    num_attention_heads: Size = 16
    attention_head_dim: Size = 72
    cross_attention_dim: Size = 1152
    caption_channels: Size | None = None
    use_additional_conditions: bool | None = None

    @property
    def takes_sizes(self) -> bool:
        given = self.use_additional_conditions
        return self.sample_size == 128 if given is None else given


class PixArt(Convention):
    title = "PixArt-alpha, PixArt-Sigma"
    networks = ("PixArtTransformer2DModel",)
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    prediction = "epsilon"
    guidance_scale = 4.5
    width_options = ("cross_attention_dim",)

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        own = checked(_Config, config, path)
        check_variance(own.in_channels, own.out_channels, path)
        return (own.in_channels, *size_of(latent, (own.sample_size, own.sample_size), path, own.patch_size))

    def fields(self, config: Config) -> Mapping[str, CondField]:
        own = _Config.model_validate(config)
        found = {
            "encoder_hidden_states": CondField((None, own.caption_channels or own.cross_attention_dim)),
            "encoder_attention_mask": CondField((None,), torch.int64),
        }
        sizes = {"resolution": CondField((2,)), "aspect_ratio": CondField((1,))}
        return found | (sizes if own.takes_sizes else {})

    def constants(self, config: Config, asked: Asked) -> dict[str, Tensor]:
        if not _Config.model_validate(config).takes_sizes:
            return {}
        height, width = asked.size
        return {
            "resolution": torch.tensor([height, width], dtype=torch.float32),
            "aspect_ratio": torch.tensor([height / width]),
        }

    def of_sizes(self, sizes: Tensor) -> dict[str, Tensor]:
        """As in the training of PixArt, the resolution is that of the original image."""
        original, _, sample = sizes.float().split(2, dim=1)
        return {"resolution": original, "aspect_ratio": sample[:, :1] / sample[:, 1:]}

    def time_layers(self, network: nn.Module) -> Sequence[str]:
        return ["adaln_single.emb"]

    def with_velocity(self, config: Config) -> Config:
        """The output is as wide as before; `call` takes its first half."""
        channels = 2 * _Config.model_validate(config).in_channels
        return {**config, "in_channels": channels, "out_channels": channels}

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        output: Tensor = network(
            x_t,
            encoder_hidden_states=cond["encoder_hidden_states"],
            encoder_attention_mask=cond["encoder_attention_mask"],
            timestep=time,
            added_cond_kwargs={name: cond.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        return output.chunk(2, dim=1)[0]

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        states, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, clean_caption=True)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


ARCHITECTURE = PixArt()
