"""Data sets of latents among data sets of pixels: which of them an autoencoder has to encode, or to decode."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distill.data.prompts import Prompts
from distill.data.source import DataSet, Items
from distill.flow.codecs import PIXELS
from distill.protocols import Codec


def codec_of(data: DataSet, codec: Codec) -> Codec:
    """What encodes the samples of a data set for a network with this codec: nothing, if they are latents."""
    return PIXELS if data.encoded else codec


def sample_shape(data: DataSet, codec: Codec) -> tuple[int, ...]:
    """The shape of one sample as a network with this codec takes it."""
    return codec_of(data, codec).shape(data.shape)


@dataclass(frozen=True)
class DecodedData:
    """A data set of latents as pixels, decoded when they are used. Implements `source.DataSet`.

    device: where they are decoded.
    """

    latents: DataSet
    codec: Codec
    device: torch.device
    buckets = None
    encoded = False

    @property
    def name(self) -> str:
        return self.latents.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codec.pixels(self.latents.shape)

    @property
    def num_classes(self) -> int | None:
        return self.latents.num_classes

    @property
    def prompts(self) -> Prompts | None:
        return self.latents.prompts

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.latents.digest} {self.codec.digest}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.latents)

    def items(self, epoch: int, indices: Sequence[int]) -> Items:
        found = self.latents.items(epoch, indices)
        return found._replace(samples=self.codec.decode(found.samples.to(self.device)).cpu())
