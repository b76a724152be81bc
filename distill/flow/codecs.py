"""The codec of networks that work on pixels. Codecs of latent-space networks implement `protocols.Codec` too."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """The identity: samples are pixels."""

    is_identity: bool = True

    def shape(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        return pixels

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents


PIXELS = Pixels()
