"""The architecture of diffusers' UNet2DModel and of our networks that are derived from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.core.field_types import GuidanceRange
from distill.flow.conditioning import WithGuidance, of_classes
from distill.networks.acceleration_unet import AccelerationUNet2DModel
from distill.networks.flow_map_unet import FlowMapUNet2DModel
from distill.networks.policy_unet import PolicyUNet2DModel
from distill.networks.velocity_unet import VelocityUNet2DModel
from distill.protocols import Cond, Conditioning
from distill.teachers.network_field import call_unet
from distill.teachers.read import NetworkConfig, checked, short


@dataclass(frozen=True)
class UNet:
    """Networks for images or their latents, with or without class labels. Implements `protocols.Architecture`."""

    classes: tuple[type[nn.Module], ...] = (
        UNet2DModel,
        VelocityUNet2DModel,
        FlowMapUNet2DModel,
        PolicyUNet2DModel,
        AccelerationUNet2DModel,
    )
    title: str = "U-Nets of images (DDPM) or their latents (LDM)"
    pipelines: tuple[str, ...] = ("any with only scheduler and unet, or also vqvae",)
    prediction: str = "epsilon, sample, v_prediction, velocity"
    conditions: str = "class labels, or none"
    guidance: str = "second call, if there is a null class"
    size_options: tuple[str, ...] = (
        "block_out_channels",
        "layers_per_block",
        "down_block_types",
        "mid_block_type",
        "up_block_types",
        "attention_head_dim",
        "norm_num_groups",
    )  # as in Convention

    def shape(self, content: dict[str, Any], path: Path) -> tuple[int, ...]:
        config = checked(NetworkConfig, content, path)
        if config.time_embedding_type == "learned":
            raise InputError(f"{path}: time_embedding_type learned supports only integer timesteps; valid: positional")
        size = config.sample_size
        fits = (
            config.out_channels % config.in_channels == 0
            if config.policy
            else config.out_channels == config.in_channels
        )
        if size is None or not fits:
            raise InputError(
                f"{path}: sample_size={size}, in_channels={config.in_channels}, out_channels={config.out_channels}; "
                "sample_size must be set, and in_channels and out_channels must be equal (out_channels a multiple, if "
                "there is a policy)"
            )
        return (config.in_channels, size, size) if isinstance(size, int) else (config.in_channels, *size)

    def conditioning(self, content: dict[str, Any], path: Path, null_class: int | None) -> Conditioning:
        return class_labels(checked(NetworkConfig, content, path), path, null_class)

    def layers(self, network: nn.Module) -> Sequence[str]:
        """The names of the blocks: down_blocks.0, ..., mid_block, up_blocks.0, ..."""
        blocks = [name for name, _ in network.named_modules() if name.count(".") == 1]
        down, up = ([name for name in blocks if name.startswith(part)] for part in ("down_blocks.", "up_blocks."))
        return [*down, "mid_block", *up]

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return call_unet(network, x_t, time, cond)


def check_pixels(channels: int, path: Path) -> None:
    """InputError unless a network with this number of channels may work on pixels."""
    if channels not in (1, 3):
        raise InputError(
            f"{path}: in_channels={channels}, as in a latent space; valid: pixel-space networks with 1 (grey) or 3 "
            "(RGB), or set teacher.vae to the folder of the autoencoder of its latents"
        )


def class_labels(config: NetworkConfig, path: Path, null_class: int | None) -> Conditioning:
    """The conditioning of a network on class labels. The null class, if there is one, must be the last embedding.

    Raises InputError if `null_class` is any other, or if the network has another kind of class embedding.
    """
    found = _classes(config, path, null_class)
    return taking_guidance(found, config.guidance_range, path)


def taking_guidance(found: Conditioning, guidance_range: GuidanceRange | None, path: Path) -> Conditioning:
    """The conditioning of a network on this and on a guidance scale, if it takes one. InputError without classes."""
    if guidance_range is None:
        return found
    if found.count is None:
        raise InputError(f"{path} has guidance_range, but no classes; copy or download it again")
    return WithGuidance(found, guidance_range)


def _classes(config: NetworkConfig, path: Path, null_class: int | None) -> Conditioning:
    if config.class_embed_type is not None:
        raise InputError(
            f"{path}: class_embed_type {short(config.class_embed_type)} is not supported; valid: networks with only "
            "num_class_embeds"
        )
    embeddings = config.num_class_embeds
    if null_class is None:
        return of_classes(embeddings, None)
    if embeddings is None:
        raise InputError(f"teacher.null_class={null_class}, but {path} has no class embeddings; leave it out")
    if null_class != embeddings - 1:
        raise InputError(
            f"teacher.null_class={null_class}: {path} has {embeddings} class embeddings, valid: the last, "
            f"{embeddings - 1}"
        )
    return of_classes(embeddings - 1, null_class)


ARCHITECTURE = UNet()
