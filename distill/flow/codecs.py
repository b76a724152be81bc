"""From pixels to what a network sees, and back. Networks of pixels need no codec; others fit `protocols.Codec`."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """The identity."""

    is_identity: bool = True

    def shape(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        return pixels

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents


PIXELS = Pixels()
