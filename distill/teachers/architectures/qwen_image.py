"""Qwen-Image: a transformer on packed latents, with guidance that keeps the norm of each token."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.flow.guidance import TINY, cfg
from distill.flow.packing import packed, unpacked
from distill.protocols import Cond
from distill.teachers.convention import CondField, Convention, size_of
from distill.teachers.read import Config, Read, Size, checked

TOKENS = 512  # of a prompt, at most


class _Config(Read):
    in_channels: Size = 64
    out_channels: Size | None = 16
    joint_attention_dim: Size = 3584
    num_attention_heads: Size = 24
    attention_head_dim: Size = 128
    # options of other pipelines
    guidance_embeds: bool = False
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False

    @property
    def channels(self) -> int:
        """Of the latents, before they are packed."""
        return self.out_channels or self.in_channels


def per_token(x_t: Tensor, t: Tensor, v: Tensor, other: Tensor, scale: float) -> Tensor:
    """Guidance whose result is rescaled to the norm of v, per token of 2x2 positions."""
    precise = torch.promote_types(v.dtype, torch.float32)
    tokens, guided = (packed(each) for each in (v.to(precise), cfg(x_t, t, v.to(precise), other.to(precise), scale)))
    norm, norm_guided = (each.norm(dim=2, keepdim=True) for each in (tokens, guided))
    return unpacked(guided * (norm / norm_guided.clamp(min=TINY)), *v.shape[2:])


class QwenImage(Convention):
    title = "Qwen-Image"
    networks = ("QwenImageTransformer2DModel",)
    pipelines = ("QwenImagePipeline",)
    prediction = "velocity"
    passes = "sigmas"
    combine = staticmethod(per_token)
    guidance_scale = 4.0  # true_cfg_scale of the pipeline, whose guidance_scale has no effect
    image_output = 1
    size_options = ("num_layers", "num_attention_heads")

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        own = checked(_Config, config, path)
        if own.guidance_embeds:
            raise InputError(
                f"{path}: guidance_embeds=true is not supported, because diffusers cannot call such a network; valid: "
                "false"
            )
        for name in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if getattr(own, name):
                raise InputError(
                    f"{path}: {name}=true: this network is also conditioned on images, as for editing or layers, which "
                    "is not supported; valid: networks of text to image"
                )
        return (own.channels, *size_of(latent, (128, 128), path, patch=2))

    def fields(self, config: Config) -> Mapping[str, CondField]:
        return {
            "encoder_hidden_states": CondField((None, _Config.model_validate(config).joint_attention_dim)),
            "encoder_hidden_states_mask": CondField((None,), torch.int64),
        }

    def unguided(self, config: Config, *, whole: bool) -> Mapping[str, float]:
        """Without a negative prompt, the pipeline does not guide the network."""
        return {}

    def unused(self, network: nn.Module) -> Sequence[str]:
        """The text after the last block."""
        last = self.layers(network)[-1]
        return [f"{last}.attn.to_add_out", f"{last}.txt_mlp"]

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        height, width = x_t.shape[-2:]
        output = network(
            hidden_states=packed(x_t),
            timestep=time / 1000,
            encoder_hidden_states=cond["encoder_hidden_states"],
            encoder_hidden_states_mask=cond["encoder_hidden_states_mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpacked(output, height, width)

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        states, mask = pipeline.encode_prompt(prompt=prompts, max_sequence_length=TOKENS)
        if mask is None:  # all prompts have the same length
            mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
        return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask}


ARCHITECTURE = QwenImage()
