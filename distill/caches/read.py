"""Reading a cache of latents: a data set that maps a few shards at a time."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from distill.caches.latents import LABELS, SIZES, sampled
from distill.caches.manifest import KIND, MIRRORED, LatentManifest
from distill.core import records
from distill.core.errors import InputError, RunError
from distill.data.source import Bucket, Items
from distill.flow import draws
from distill.shards import LatestShards, mapped
from distill.shards import manifest as files
from distill.shards.values import DTYPES, restored
from distill.spec.layout import MAX_MANIFEST
from distill.teachers import sharded_rows

# Shards whose images are shuffled together. Images are stored in the order of the data, often one class after the
# other, so that few shards would give batches of few classes.
MIXED = 64


class CachedLatents:
    """A complete cache of latents. Implements `data.DataSet` and `data.source.ShardedData`.

    Only the manifest is in memory. A sample depends only on (seed, epoch, index): the sample of its moments, and
    whether it is of the mirrored image.
    """

    prompts = None  # they are not stored; `manifest.prompts_digest` says which they are
    group = MIXED

    def __init__(self, folder: Path, manifest: LatentManifest, seed: int) -> None:
        self.folder, self.manifest, self.seed, self._layout = folder, manifest, seed, manifest.layout
        self.name, self.shape, self.num_classes = manifest.data, manifest.shape, manifest.num_classes
        self.encoded = manifest.latents != "pixels"
        self._shards = LatestShards(self._load, 2 * MIXED * max(1, len(manifest.buckets)))

    @cached_property
    def digest(self) -> str:
        """That of the manifest."""
        return self.manifest.digest

    @property
    def buckets(self) -> list[Bucket] | None:
        """The items of each size; None: all have one."""
        ends, buckets = self.manifest.first_items, self.manifest.buckets
        found = [Bucket(each.shape, range(*i)) for each, i in zip(buckets, pairwise(ends), strict=bool(buckets))]
        return found or None

    @property
    def shards(self) -> list[list[range]]:
        """The items of each shard, for each size."""
        found: list[list[range]] = [[] for _ in self.manifest.first_items[1:]]
        for number in range(self._layout.files):
            found[self._layout.bucket(number)].append(self._layout.indices(number))
        return found

    def __len__(self) -> int:
        return self.manifest.count

    def items(self, epoch: int, indices: Sequence[int]) -> Items:
        """Samples [n, ...] float32, labels and sizes of these items, which must have one size."""
        parts: dict[int, list[int]] = {}  # by shard, the places in `indices`
        for place, index in enumerate(indices):
            parts.setdefault(self._layout.holding(index), []).append(place)
        found = [
            self._of_shard(number, epoch, [indices[place] for place in places]) for number, places in parts.items()
        ]
        back = torch.argsort(torch.tensor([place for places in parts.values() for place in places]))
        labels, sizes = ([each for each in column if each is not None] for column in list(zip(*found, strict=True))[1:])
        return Items(
            torch.cat([each.samples for each in found])[back],
            torch.cat(labels)[back] if labels else None,
            torch.cat(sizes)[back] if len(sizes) == len(found) else None,
        )

    def _of_shard(self, number: int, epoch: int, indices: list[int]) -> Items:
        shard, start = self._shards[number], self._layout.indices(number).start
        rows = torch.tensor([index - start for index in indices])
        labels, sizes = (shard[name][rows] if name in shard else None for name in (LABELS, SIZES))
        return Items(self._samples(shard, rows, epoch, indices), labels, sizes)

    def _samples(self, shard: dict[str, Tensor], rows: Tensor, epoch: int, indices: list[int]) -> Tensor:
        kind = self.manifest.latents
        flipped = torch.zeros(len(rows), dtype=torch.bool)
        if self.manifest.mirrored:  # by the rule of data with flip, but for the number of the item in the cache
            flipped = torch.tensor([draws.uniforms(3, self.seed, epoch, index)[2] < 0.5 for index in indices])
        if kind == "pixels":
            pixels = restored(shard["pixels"][rows])
            return torch.where(flipped.reshape(-1, *[1] * (pixels.ndim - 1)), pixels.flip(-1), pixels)
        if kind != "moments":
            return _chosen(shard, kind, rows, flipped)
        mean, log_variance = (_chosen(shard, name, rows, flipped) for name in ("mean", "log_variance"))
        noise = draws.sample_noise(draws.key(self.seed, "latents", epoch), indices, tuple(mean.shape[1:]))
        return sampled(mean, log_variance, noise)

    def _load(self, number: int) -> dict[str, Tensor]:
        """A shard, mapped into memory. RunError if it cannot be read or does not fit the manifest."""
        manifest, name = self.manifest, self._layout.name(number)
        shape, count = manifest.shape_in(number), len(self._layout.indices(number))
        expected = dict.fromkeys(manifest.tensors, (DTYPES[manifest.dtype], (count, *shape)))
        if manifest.num_classes is not None:
            expected[LABELS] = (torch.int64, (count,))
        if manifest.shards[name].sizes:
            expected[SIZES] = (torch.int64, (count, 6))
        tensors = mapped.load(self.folder / name, expected)
        labels, classes = tensors.get(LABELS), manifest.num_classes
        if labels is not None and classes is not None and not 0 <= labels.min() <= labels.max() < classes:
            raise RunError(f"{self.folder / name} has labels outside 0 ... {classes - 1}, those of its manifest.json")
        return tensors


def _chosen(shard: dict[str, Tensor], name: str, rows: Tensor, flipped: Tensor) -> Tensor:
    """Rows of a tensor of latents in float32; of its mirrored version where `flipped` [n]."""
    values = restored(shard[name][rows])
    if flipped.any():
        values[flipped] = restored(shard[MIRRORED + name][rows[flipped]])
    return values


def open_latents(folder: Path, seed: int, *, codec_digest: str | None = None) -> CachedLatents:
    """Open a complete cache. Only the manifest and the sizes of the files are checked; see `verify`.

    seed: of samples of the moments and of the choice of mirrored images. codec_digest: of the autoencoder that must
    have made it; None: any. InputError if it is incomplete, or made by another autoencoder.
    """
    manifest = files.complete(KIND, folder)
    if codec_digest not in (None, manifest.codec_digest):
        raise InputError(
            f"{folder} has latents of another autoencoder (digest {manifest.codec_digest[:12] or 'none: pixels'}) than "
            f"the teacher's ({str(codec_digest)[:12] or 'none: pixels'}); run `distill cache` with this teacher"
        )
    files.refuse_faults(folder, files.faults(KIND, folder, manifest, content=False))
    return CachedLatents(folder, manifest, seed)


class _AnyCache(BaseModel):
    kind: Literal["latents", "prompts"]


def verify(folder: Path, rank: int = 0, size: int = 1) -> None:
    """Compare the shards of a cache (latents or prompts) with their checksums. InputError if one is damaged.

    rank, size: only the shards rank, rank + size, ...
    """
    part, path = (rank, size), folder / "manifest.json"
    try:
        kind = _AnyCache.model_validate_json(records.read_small(path, MAX_MANIFEST)).kind
    except FileNotFoundError:
        raise InputError(f"{folder} contains no cache (no manifest.json); run `distill cache` to make it") from None
    except ValidationError:
        raise InputError(f"{path} is damaged or is not of a cache; delete {folder} and make the cache again") from None
    if kind == "latents":
        wrong = files.faults(KIND, folder, files.complete(KIND, folder), part)
    else:
        manifest = files.complete(sharded_rows.KIND, folder)
        wrong = files.faults(sharded_rows.KIND, folder, manifest, part)
        wrong += sharded_rows.null_faults(folder, manifest) if rank == 0 else []
    files.refuse_faults(folder, wrong)
