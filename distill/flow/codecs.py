"""The codec of networks that work on pixels. Codecs of latent-space networks implement `protocols.Codec` too."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.core.errors import InputError

MEMORY = 64 << 20  # bytes of pixels that are encoded, decoded or sampled together


@dataclass(frozen=True)
class Pixels:
    """The identity: samples are pixels."""

    is_identity: bool = True
    has_spread: bool = False
    digest: str = ""

    def scaling(self) -> "LatentScaling":
        return LatentScaling(torch.zeros(1), torch.ones(1))

    def shape(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        return pixels

    def pixels(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def together(self, shape: tuple[int, ...]) -> int:
        return together(shape)

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("pixels have no distribution of latents")

    def decode(self, latents: Tensor) -> Tensor:
        return latents


@dataclass(frozen=True)
class LatentScaling:
    """From latents z [B, C, ...] as an autoencoder returns them to those that the network takes: (z - shift) scale.

    shift, scale: [1] or [C] float32, on the CPU. patches: 2x2 patches of z become channels first, and C is their
    number after that.
    """

    shift: Tensor
    scale: Tensor
    patches: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 over everything that changes the result."""
        content = hashlib.sha256(repr(self.patches).encode())
        for each in (self.shift, self.scale):
            content.update(repr(each.float().tolist()).encode())
        return content.hexdigest()

    def shape(self, latents: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one scaled sample. InputError if latents of this shape cannot be scaled."""
        channels, *sides = latents
        if self.patches:
            if len(sides) != 2 or sides[0] % 2 or sides[1] % 2:
                raise InputError(
                    f"latents of shape {list(latents)} have no 2x2 patches; valid: [C, h, w] with even height and width"
                )
            channels, sides = 4 * channels, [side // 2 for side in sides]
        for each in (self.shift, self.scale):
            if len(each) not in (1, channels):
                raise InputError(
                    f"latents of shape {list(latents)} have {latents[0]} channels; valid for the teacher's "
                    f"autoencoder: {len(each) // 4 if self.patches else len(each)}"
                )
        return (channels, *sides)

    def __call__(self, z: Tensor) -> Tensor:
        z = nn.functional.pixel_unshuffle(z, 2) if self.patches else z  # channels, then the rows and columns of a patch
        shift, scale = self._like(z)
        return (z - shift) * scale

    def log_variance(self, of_z: Tensor) -> Tensor:
        """The logarithm of the variance of the scaled latents, from that of z."""
        of_z = nn.functional.pixel_unshuffle(of_z, 2) if self.patches else of_z
        return of_z + 2 * self._like(of_z)[1].abs().log()

    def inverse(self, latents: Tensor) -> Tensor:
        shift, scale = self._like(latents)
        z = latents / scale + shift
        return nn.functional.pixel_shuffle(z, 2) if self.patches else z

    def _like(self, z: Tensor) -> list[Tensor]:
        sides = [1] * (z.ndim - 2)
        return [each.to(z).reshape(1, -1, *sides) for each in (self.shift, self.scale)]


def together(pixels: tuple[int, ...]) -> int:
    """How many samples of this shape in pixels, in float32, are at most MEMORY; at least one."""
    return max(1, MEMORY // (4 * math.prod(pixels)))


PIXELS = Pixels()
