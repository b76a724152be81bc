"""The codec of networks that work on pixels. Codecs of latent-space networks implement `protocols.Codec` too."""

import math
from dataclasses import dataclass

from torch import Tensor

MEMORY = 64 << 20  # bytes of pixels that are encoded, decoded or sampled together


@dataclass(frozen=True)
class Pixels:
    """The identity: samples are pixels."""

    is_identity: bool = True
    digest: str = ""

    def shape(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        return pixels

    def together(self, shape: tuple[int, ...]) -> int:
        return together(shape)

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def together(pixels: tuple[int, ...]) -> int:
    """How many samples of this shape in pixels, in float32, are at most MEMORY; at least one."""
    return max(1, MEMORY // (4 * math.prod(pixels)))


PIXELS = Pixels()
