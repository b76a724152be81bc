"""Data sets of latents among data sets of pixels: which of them an autoencoder has to encode, or to decode."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.core.errors import InputError
from distill.data.latents import LatentData
from distill.data.prompts import Prompts
from distill.data.source import DataSet, Items
from distill.flow.codecs import PIXELS, LatentScaling
from distill.protocols import Codec

KEEP_BYTES = 2**30  # maximum size of decoded samples that are kept in memory


def scaled_for(data: DataSet, codec: Codec) -> DataSet:
    """The data set with latents that are scaled as a network with this codec takes them.

    InputError if they are not scaled and the codec has no autoencoder, or if they do not fit its autoencoder.
    """
    if not isinstance(data, LatentData) or data.scaled:
        return data
    if codec.is_identity:
        raise InputError(
            f"data.scaled=false: the latents of '{data.name}' are not scaled, but the teacher has no autoencoder whose "
            "config says how its network takes them; give teacher.vae, or scaled latents and data.scaled: true"
        )
    return ScaledLatents(data, codec.scaling())


def codec_of(data: DataSet, codec: Codec) -> Codec:
    """What encodes the samples of a data set for a network with this codec: nothing, if they are latents."""
    return PIXELS if data.encoded else codec


def sample_shape(data: DataSet, codec: Codec) -> tuple[int, ...]:
    """The shape of one sample as a network with this codec takes it."""
    return codec_of(data, codec).shape(scaled_for(data, codec).shape)


@dataclass(frozen=True)
class ScaledLatents:
    """A data set of latents as an autoencoder returns them, with the scale of its network. Implements `DataSet`."""

    latents: LatentData
    scaling: LatentScaling
    prompts = None
    buckets = None
    encoded = True

    @property
    def name(self) -> str:
        return self.latents.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.scaling.shape(self.latents.shape)

    @property
    def num_classes(self) -> int | None:
        return self.latents.num_classes

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.latents.digest} {self.scaling.digest}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.latents)

    def items(self, epoch: int, indices: Sequence[int]) -> Items:
        found = self.latents.items(epoch, indices)
        return found._replace(samples=self.scaling(found.samples))


@dataclass(frozen=True)
class DecodedData:
    """A data set of latents as pixels, for evaluations. Implements `source.DataSet`.

    All epochs have the samples of epoch 0. They are decoded on `device` when they are used, and up to KEEP_BYTES of
    them are kept in memory.
    """

    latents: DataSet
    codec: Codec
    device: torch.device
    _kept: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
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
        found = self.latents.items(0, indices)
        new = [place for place, index in enumerate(indices) if index not in self._kept]
        pixels = dict(zip(new, self.codec.decode(found.samples[new].to(self.device)).cpu(), strict=True)) if new else {}
        samples = torch.stack([pixels[i] if i in pixels else self._kept[each] for i, each in enumerate(indices)])
        most = KEEP_BYTES // (4 * math.prod(self.shape))
        for place in new[: max(0, most - len(self._kept))]:
            self._kept[indices[place]] = pixels[place].clone()
        return found._replace(samples=samples)
