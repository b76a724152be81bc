"""Encodes the images of a data set, shard by shard. A process that is killed loses only the shard it is working on."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor

from distill.caches.manifest import KIND, MAX_NOTED, MIRRORED, CachedBucket, LatentManifest, LatentShard
from distill.core.errors import InputError, RunError
from distill.core.stop import StopRequest
from distill.core.text import one_line
from distill.data.source import Bucket, DataSet, Items, Skipping
from distill.flow import draws
from distill.protocols import Codec
from distill.runs.progress import Progress
from distill.shards import make
from distill.shards.values import restored, stored
from distill.spec import cachespec
from distill.spec.cachespec import CacheStage

LABELS, SIZES = "labels", "sizes"  # names of tensors


def plan(
    data: DataSet, codec: Codec, stage: CacheStage, *, seed: int, mirrored: bool = False, prefix: str = ""
) -> LatentManifest:
    """The manifest of a cache of latents, without shards. No network is loaded.

    data: with crop: center and without flip. mirrored: also store mirrored images, for data with flip. prefix: of the
    names of the stage's settings in messages. InputError if these do not fit together, or do not fit the codec or the
    data.
    """
    for mistake in cachespec.mistakes(stage, prefix):
        raise InputError(mistake)
    if data.encoded:
        raise InputError(
            f"data '{data.name}' has latents already, so there is nothing to encode; remove the cache stage"
        )
    latents = check(stage, codec, prefix)
    if latents == "pixels" and data.prompts is None and stage.dtype != "float32":
        raise InputError(
            f"{prefix}dtype: {stage.dtype} given, but it has no effect: the teacher works on pixels, which are stored "
            "as uint8, and the data has no prompts; remove it"
        )
    return LatentManifest(
        data=one_line(data.name, 1000),
        data_digest=data.digest,
        codec_digest=codec.digest,
        latents=latents,
        mirrored=mirrored,
        seed=seed if latents == "sample" else None,
        dtype="uint8" if latents == "pixels" else stage.dtype,
        count=len(data),
        buckets=[CachedBucket(shape=codec.shape(each.shape), count=len(each.items)) for each in _filled(data)],
        block=stage.block,
        shard=stage.shard,
        shape=codec.shape(data.shape),
        num_classes=data.num_classes,
        prompts_digest=None if data.prompts is None else data.prompts.digest,
    )


def check(stage: CacheStage, codec: Codec, prefix: str) -> Literal["moments", "sample", "mean", "pixels"]:
    """What is stored for an image. InputError if the codec cannot give what the stage asks for.

    prefix: of the names of the stage's settings in messages.
    """
    if codec.is_identity:
        if stage.latents not in (None, "pixels"):
            raise InputError(
                f"{prefix}latents: {stage.latents} given, but the teacher works on pixels and has no autoencoder; "
                "valid: pixels"
            )
        return "pixels"
    valid = "moments, sample, mean" if codec.has_spread else "mean"
    if stage.latents == "pixels":
        raise InputError(f"{prefix}latents: pixels given, but the teacher works on latents; valid: {valid}")
    if stage.latents in ("moments", "sample") and not codec.has_spread:
        raise InputError(
            f"{prefix}latents: {stage.latents} given, but the teacher's autoencoder gives no variance; valid: {valid}"
        )
    return stage.latents or ("moments" if codec.has_spread else "mean")


def generate(
    data: DataSet,
    codec: Codec,
    stage: CacheStage,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
    stop: StopRequest,
    part: tuple[int, int] | None = None,
    mirrored: bool = False,
) -> None:
    """Make the shards of a cache that `folder` does not have yet, from the items of epoch 0. See `shards.make`.

    If an image turns out to be unreadable, its row has what the data set returns in its place. The progress counts
    images.

    data, mirrored: see `plan`. part: (i, n) makes only the shards i, i + n, ...; the process that ends last completes
    the set. InputError if the folder holds another set or cannot be written, or if more images are unreadable than the
    data allows; RunError if latents are not finite.
    """
    planned, noted = plan(data, codec, stage, seed=seed, mirrored=mirrored), 0
    reading = _ReadAhead(data, planned)

    def solve(block: range) -> dict[str, Tensor]:
        items = reading.items(block)
        found = _encoded(items.samples.to(device), codec, planned, block)
        found = {name: stored(values, planned.dtype).cpu() for name, values in found.items()}
        _refuse_non_finite(found, planned, block)
        if items.labels is not None:
            found[LABELS] = items.labels
        return found if items.sizes is None else found | {SIZES: items.sizes}

    def encode(blocks: list[dict[str, Tensor]], indices: range) -> tuple[bytes, LatentShard]:
        tensors = {name: torch.cat([block[name] for block in blocks]).contiguous() for name in blocks[0]}
        nonlocal noted
        skipped = list(data.skipped[noted:]) if isinstance(data, Skipping) else []
        noted += len(skipped)
        content = save(tensors)
        return content, LatentShard(
            start=indices.start,
            stop=indices.stop,
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            sizes=SIZES in tensors,
            skipped=sorted(skipped)[:MAX_NOTED],
        )

    def check(listed: Mapping[str, LatentShard]) -> None:
        """Count the unreadable images that all processes have found."""
        if isinstance(data, Skipping):
            data.skip(sorted({row for file in listed.values() for row in file.skipped}))

    with reading.thread:
        make(
            KIND,
            planned,
            folder,
            block=planned.block,
            item_bytes=planned.bytes_of(planned.shape),
            solve=solve,
            encode=encode,
            progress=progress,
            stop=stop,
            part=part,
            check=check,
        )


class _ReadAhead:
    """Reads the items of blocks in a thread: while a block is encoded, the next one of its shard is decoded."""

    def __init__(self, data: DataSet, planned: LatentManifest) -> None:
        self.data, self.planned, self.buckets = data, planned, _filled(data)
        self.thread = ThreadPoolExecutor(1, "read images")
        self._next: tuple[range, Future[Items]] | None = None

    def items(self, block: range) -> Items:
        ready = self._next
        reading = ready[1] if ready is not None and ready[0] == block else self.thread.submit(self._read, block)
        end = self.planned.layout.indices(self.planned.layout.holding(block.start)).stop
        following = range(block.stop, min(block.stop + self.planned.block, end))
        self._next = (following, self.thread.submit(self._read, following)) if following else None
        return reading.result()

    def _read(self, block: range) -> Items:
        """The items of the data that are those of a block of the cache."""
        if not self.buckets:
            return self.data.items(0, block)
        bucket = self.planned.layout.bucket(self.planned.layout.holding(block.start))
        first = self.planned.first_items[bucket]
        chosen = self.buckets[bucket].items[block.start - first : block.stop - first]
        return self.data.items(0, [int(item) for item in chosen])


def _filled(data: DataSet) -> list[Bucket]:
    """The buckets of the data that are not empty."""
    return [each for each in data.buckets or [] if len(each.items)]


def _encoded(samples: Tensor, codec: Codec, planned: LatentManifest, block: range) -> dict[str, Tensor]:
    """The tensors of latents of some samples [n, ...] by name, in float32."""
    if planned.latents == "pixels":
        return {"pixels": samples}
    versions = {"": samples, MIRRORED: samples.flip(-1)} if planned.mirrored else {"": samples}
    found = {}
    for prefix, pixels in versions.items():
        if planned.latents == "mean":
            found[f"{prefix}mean"] = codec.encode(pixels)
            continue
        mean, log_variance = codec.moments(pixels)
        if planned.latents == "moments":
            found |= {f"{prefix}mean": mean, f"{prefix}log_variance": log_variance}
            continue
        assert planned.seed is not None
        noise = draws.sample_noise(draws.key(planned.seed, "latents", prefix), block, tuple(mean.shape[1:]))
        found[f"{prefix}sample"] = sampled(mean, log_variance, noise.to(mean.device))
    return found


def sampled(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """A sample of the normal distribution with these moments; noise: standard normal. All [n, ...]."""
    return mean + (0.5 * log_variance).exp() * noise


def _refuse_non_finite(found: Mapping[str, Tensor], planned: LatentManifest, block: range) -> None:
    for name, values in found.items():
        finite = restored(values).isfinite().flatten(1).all(1)
        if not finite.all():
            raise RunError(
                f"the {name} of image {block[int(finite.int().argmin())]} contains NaN or infinity as {planned.dtype}; "
                "its shard was not written, earlier ones are intact. Use dtype: float32, or another autoencoder"
            )
