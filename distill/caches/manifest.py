"""The manifest of a cache of latents: all settings that its values depend on, and its shards."""

import hashlib
import math
from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, PositiveInt, model_validator

from distill.core.atomic import write_json
from distill.core.field_types import FrozenModel, PairCount, ShardPairs
from distill.shards import manifest as files
from distill.shards.manifest import ItemIndex, SetKind, Sha256
from distill.spec.layout import Layout
from distill.spec.samplingspec import STORED_BYTES

MIRRORED = "mirrored_"  # what the names of the tensors of mirrored images begin with
LATENT_TENSORS = {
    "moments": ("mean", "log_variance"),
    "sample": ("sample",),
    "mean": ("mean",),
    "pixels": ("pixels",),
}
MAX_NOTED = 1000  # unreadable images that a record lists
SampleShape = Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=8)]


class LatentShard(FrozenModel):
    """The entry of a complete shard, which has the items start, ..., stop - 1."""

    start: ItemIndex
    stop: ItemIndex
    size: PositiveInt
    """bytes"""
    sha256: Sha256
    sizes: bool
    """whether it has the sizes of its images, see `protocols.Conditioning`"""
    skipped: Annotated[list[ItemIndex], Field(max_length=MAX_NOTED)] = []
    """only in records: rows of the data that turned out to be unreadable while the shard was made"""


class CachedBucket(FrozenModel):
    """The items of one size."""

    shape: SampleShape
    """of one sample"""
    count: PairCount


class LatentManifest(FrozenModel):
    """All settings that the values of a cache of latents depend on, and its shards.

    Item i of the cache is item i of the data, or, if the data has buckets, the i-th item of all buckets in their order.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    format: Literal[1] = 1
    kind: Literal["latents"] = "latents"
    data: Annotated[str, Field(max_length=10_000)]
    """name of the data, for readers"""
    data_digest: Sha256
    codec_digest: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    """of the autoencoder; empty: pixels"""
    latents: Literal["moments", "sample", "mean", "pixels"]
    mirrored: bool
    """whether images are mirrored with probability 1/2 when they are read; latents of both are stored"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None
    """of the samples; null unless latents is sample"""
    dtype: Literal["float32", "float16", "bfloat16", "uint8"]
    count: PairCount
    buckets: Annotated[list[CachedBucket], Field(max_length=10_000)] = []
    """if the data has items of several sizes"""
    block: ShardPairs
    """images that are encoded together"""
    shard: ShardPairs
    """images per file"""
    shape: SampleShape
    """of one sample; with buckets, that of the data's `size`"""
    num_classes: PositiveInt | None
    """classes or prompts; null: there are no labels"""
    prompts_digest: Sha256 | None = None
    """of the prompts that labels are numbers of; null: labels are classes"""
    shards: dict[str, LatentShard] = {}
    done: bool = False

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.buckets and (total := sum(each.count for each in self.buckets)) != self.count:
            raise ValueError(f"buckets have {total} items, count is {self.count}")
        if (self.seed is None) == (self.latents == "sample"):
            raise ValueError(f"seed must {'' if self.seed is None else 'not '}be given with latents: {self.latents}")
        if (self.dtype == "uint8") != (self.latents == "pixels"):
            raise ValueError(f"dtype is {self.dtype} with latents: {self.latents}")
        files.check("images", self.layout, self.shards, 0)
        for name, file in self.shards.items():
            number = self.layout.holding(file.start)
            if file.size < (file.stop - file.start) * self.bytes_of(self.shape_in(number)):
                raise ValueError(f"shards: {name} has {file.size} bytes, too few for its images")
        return self

    @cached_property
    def layout(self) -> Layout:
        """Which items belong in which file, whether or not it exists."""
        return Layout(self.count, self.shard, tuple(each.count for each in self.buckets))

    def shape_in(self, number: int) -> tuple[int, ...]:
        """The shape of one sample in file `number`."""
        return self.buckets[self.layout.bucket(number)].shape if self.buckets else self.shape

    @property
    def tensors(self) -> list[str]:
        """The names of the tensors of latents in a shard."""
        names = LATENT_TENSORS[self.latents]
        stores_mirrored = self.mirrored and self.latents != "pixels"  # pixels are mirrored when they are read
        return [*names, *(MIRRORED + name for name in names if stores_mirrored)]

    @property
    def first_items(self) -> list[int]:
        """The first item of each bucket, and the number of all items."""
        return list(accumulate((each.count for each in self.buckets) if self.buckets else [self.count], initial=0))

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Bytes of the latents of one image, whose samples have this shape."""
        return len(self.tensors) * math.prod(shape) * STORED_BYTES[self.dtype]

    @property
    def key(self) -> str:
        """SHA-256 over the settings, without the shards: the folder is STORE/caches/latents-KEY."""
        settings = self.model_dump_json(exclude={"data", "shards", "done"})
        return hashlib.sha256(settings.encode()).hexdigest()

    @property
    def digest(self) -> str:
        """SHA-256 over the settings and the checksums of the shards."""
        return hashlib.sha256(self.model_dump_json(exclude={"data"}).encode()).hexdigest()

    def with_shards(self, shards: Mapping[str, LatentShard], done: bool) -> Self:
        known = {name: file.model_copy(update={"skipped": []}) for name, file in shards.items()}
        return self.model_copy(update={"shards": known, "done": done})

    def differences(self, other: "LatentManifest") -> list[str]:
        """The settings that differ from those of the set `other`, each as "name is X, expected Y"."""
        mine, others = (each.model_dump(exclude={"data", "shards", "done"}) for each in (self, other))
        return [f"{name} is {value}, expected {others[name]}" for name, value in mine.items() if value != others[name]]

    def save(self, folder: Path) -> None:
        """Write the manifest. It does not list unreadable images, so that its bytes depend on the settings only."""
        content = self.model_dump(mode="json", exclude={"shards": {"__all__": {"skipped"}}})
        write_json(folder / "manifest.json", content)


KIND: SetKind[LatentManifest, LatentShard] = SetKind("images", LatentManifest, LatentShard, shared=True)
