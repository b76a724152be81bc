"""Makes the caches of a spec in the store, or finds them there: latents of its images, embeddings of its prompts.

Which caches these are follows from the data, the files of the encoders and the settings of the cache stage, without
loading an encoder.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from distill import caches
from distill.core import file_checksums
from distill.core.errors import InputError
from distill.core.stop import StopRequest
from distill.data import DataSet, load_data, load_prompts
from distill.data.prompts import Prompts
from distill.flow.codecs import PIXELS
from distill.protocols import Codec
from distill.runs import cached
from distill.runs.cached import UsedCache
from distill.runs.progress import Progress
from distill.shards import remove_records
from distill.spec import cacheuse, layout
from distill.spec.layout import Layout
from distill.spec.model import CacheStage, CheckpointTeacher, RunSpec
from distill.spec.resolved import Resolved
from distill.spec.samplingspec import STORED_BYTES
from distill.teachers import checkpoint, conditions, encoder_files, encoding, files
from distill.teachers.codecs import LatentCodec
from distill.teachers.convention import Convention
from distill.teachers.describe import describe


@dataclass(frozen=True)
class Caching:
    """The caches of a spec with what they are made from.

    data: with crop: center, and without flip; None: there are only prompts.
    """

    spec: RunSpec
    stage: CacheStage
    name: str
    store: Path
    data: DataSet | None
    prompts: Prompts | None
    codec: Codec
    planned: Sequence[UsedCache]
    layouts: Sequence[Layout]
    """of each of them"""

    @classmethod
    def of(cls, resolved: Resolved, store: Path, place: Path | None, *, indexed: bool = False) -> "Caching":
        """The caches of the spec's cache stage. InputError if there is nothing to store, or an encoder is missing.

        place: the store or the run that may have an index of the images. indexed: see `load_data`.
        """
        spec, name = resolved.spec, resolved.spec.cache
        assert name is not None
        stage = spec.stages[name]
        assert isinstance(stage, CacheStage)
        data, prompts = _data(spec, place, indexed=indexed)
        codec, takes_prompts = _encoders(spec)
        check(resolved, data, prompts, takes_prompts=takes_prompts)
        found, layouts = [], []
        if cacheuse.stores_latents(resolved):
            assert data is not None, "checks.check lets no such stage through"
            planned = _planned(spec, name, stage, data, codec)
            layouts.append(planned.layout)
            folder = cached.folder_of("latents", planned.key)
            found.append(UsedCache("latents", folder, planned.layout.count, planned.layout.files))
        if takes_prompts and cacheuse.may_store_prompts(spec):
            assert isinstance(spec.teacher, CheckpointTeacher) and prompts is not None
            key = caches.prompts.key(prompts.digest, encoder_files.digest(spec.teacher), stage)
            layouts.append(Layout(len(prompts), stage.prompts_shard))
            folder = cached.folder_of("prompts", key)
            found.append(UsedCache("prompts", folder, len(prompts), layouts[-1].files))
        return cls(spec, stage, name, store, data, prompts, codec, found, layouts)

    def place(self, cache: UsedCache) -> Path:
        return cache.place(self.store)

    def size(self, cache: UsedCache, part: tuple[int, int]) -> int:
        """Number of items in a part of a cache."""
        own = self.layouts[self.planned.index(cache)]
        return own.items(own.part(part))

    def make(
        self, cache: UsedCache, device: torch.device, progress: Progress, stop: StopRequest, part: tuple[int, int]
    ) -> None:
        """Make the shards i, i + n, ... of part (i, n) of a cache that the store does not have yet, or verify them.

        Several processes, also of other runs, may make the same shards at once: their bytes are the same.
        """
        folder, whole = self.place(cache), part == (0, 1)
        if self._are_there(cache, part):
            progress.start(self.size(cache, part))
            return
        if cache.what == "latents":
            assert self.data is not None
            caches.latents.generate(
                self.data,
                self.codec,
                self.stage,
                folder,
                seed=self.spec.seed,
                device=device,
                progress=progress,
                stop=stop,
                part=None if whole else part,
                mirrored=self.spec.data.is_mirrored,
            )
            return
        assert isinstance(self.spec.teacher, CheckpointTeacher) and self.prompts is not None
        dtype = checkpoint.DTYPES[self.stage.encoder_dtype]
        caches.prompts.generate(
            self.prompts,
            encoding.load(self.spec.teacher, device, dtype),
            self.stage,
            folder,
            progress=progress,
            stop=stop,
            part=None if whole else part,
        )

    def _are_there(self, cache: UsedCache, part: tuple[int, int]) -> bool:
        """Whether the shards of a part are there, and undamaged. They are read only if the cache is complete."""
        if part[0] >= cache.files:
            return True
        if not self.is_complete(cache):
            return False
        try:
            caches.verify(self.place(cache), *part)
        except InputError:
            return False
        return True

    def make_all(self, device: torch.device, stop: StopRequest, part: tuple[int, int]) -> None:
        """Make part (i, n) of all caches, without a run."""
        for each in self.planned:
            with Progress(self.name, self.size(each, part), each.unit, None) as progress:
                self.make(each, device, progress, stop, part)

    def shards(self, cache: UsedCache) -> int:
        """The number of shards that are complete. They are not read."""
        return layout.made(self.place(cache))

    def is_complete(self, cache: UsedCache) -> bool:
        """Whether all shards are there. They are not read."""
        return len(layout.listed(self.place(cache)) or {}) == cache.files

    def latents(self) -> DataSet | None:
        """The cached latents in the store; None if they are not complete, or if none are stored."""
        found = next((each for each in self.planned if each.what == "latents" and self.is_complete(each)), None)
        return None if found is None else caches.open_latents(self.place(found), self.spec.seed)

    def tidy(self) -> None:
        """Remove the records of shards from caches that are complete, since their manifests list all shards."""
        for cache, own in zip(self.planned, self.layouts, strict=True):
            if self.is_complete(cache):
                with suppress(OSError):  # it may belong to another user
                    remove_records(self.place(cache), own)

    def finished(self, cache: UsedCache) -> UsedCache:
        """A complete cache with its digest. InputError if it is not complete."""
        folder = self.place(cache)
        digest = (
            caches.open_latents(folder, self.spec.seed).digest
            if cache.what == "latents"
            else conditions.read(folder).digest
        )
        with suppress(OSError):  # so that `distill clean` keeps it; it may belong to another user
            os.utime(folder)
        return UsedCache(cache.what, cache.folder, cache.count, cache.files, digest)


def keep_checksums(spec: RunSpec, encoders: bool, store: Path, run: Path | None = None) -> None:
    """Keep the checksums of the files of the teacher's autoencoder, and of its text encoders, in a store and a run.

    So not every process of a run reads these large files. encoders: whether those of the text encoders are needed too.
    RunError if they cannot be written to the run. Files that are missing or cannot be read are left to `Caching.of`.
    """
    if not isinstance(spec.teacher, CheckpointTeacher):
        return
    paths: list[Path] = []
    with suppress(InputError, OSError):
        codec, takes_prompts = _encoders(spec)
        paths += codec.paths if isinstance(codec, LatentCodec) else []
        if encoders and takes_prompts and cacheuse.may_store_prompts(spec):
            paths += encoder_files.find(spec.teacher).paths
    with suppress(OSError):
        file_checksums.keep(paths, store, run)


def measure(resolved: Resolved, device: torch.device) -> tuple[float, int]:
    """(seconds, bytes) that one process needs for the caches of a spec, as predicted from one block of each."""
    spec = resolved.spec
    stage = spec.stages[spec.cache or ""]
    assert isinstance(stage, CacheStage)
    (data, prompts), (codec, takes_prompts) = _data(spec, None, indexed=False), _encoders(spec)
    seconds, count = 0.0, 0
    if cacheuse.stores_latents(resolved) and data is not None:
        planned = _planned(spec, spec.cache or "", stage, data, codec)
        block = _some_items(data, stage.block)

        def images() -> None:
            samples = data.items(0, block).samples.to(device)
            if planned.latents != "pixels":
                for version in (samples, samples.flip(-1)) if planned.mirrored else (samples,):
                    codec.encode(version)

        seconds += len(data) / len(block) * _least(images)
        count += len(data) * planned.bytes_of(planned.shape)
    if takes_prompts and cacheuse.may_store_prompts(spec) and prompts is not None:
        assert isinstance(spec.teacher, CheckpointTeacher)
        encoders = encoding.load(spec.teacher, device, checkpoint.DTYPES[stage.encoder_dtype])
        some = prompts[: stage.block]
        rows = encoders.rows(some)
        seconds += len(prompts) / len(some) * _least(lambda: encoders.rows(some))
        # A shard is as long as its longest prompt, so this is a rough estimate.
        sizes = [STORED_BYTES[stage.dtype] if each.is_floating_point() else each.itemsize for each in rows.values()]
        count += len(prompts) * sum(each[0].numel() * size for each, size in zip(rows.values(), sizes, strict=True))
    return seconds, count


def _planned(spec: RunSpec, name: str, stage: CacheStage, data: DataSet, codec: Codec) -> caches.LatentManifest:
    mirrored = spec.data.is_mirrored
    return caches.latents.plan(data, codec, stage, seed=spec.seed, mirrored=mirrored, prefix=f"stages.{name}.")


def _some_items(data: DataSet, count: int) -> Sequence[int]:
    """At most `count` items of one size: if the data has buckets, of the one with the most items."""
    if data.buckets is None:
        return range(min(count, len(data)))
    largest = max(data.buckets, key=lambda each: len(each.items))
    return [int(item) for item in largest.items[:count]]


def _least(call: Callable[[], object]) -> float:
    """The seconds of the faster of two calls; the first one also loads what it needs."""
    times = []
    for _ in range(2):
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return min(times)


def _data(spec: RunSpec, place: Path | None, *, indexed: bool) -> tuple[DataSet | None, Prompts | None]:
    """The images of a spec as they are encoded, and its prompts; None where it has none."""
    options = spec.data.model_copy(update={"flip": False}) if spec.data.is_mirrored else spec.data
    data = load_data(options, spec.seed, place, indexed=indexed)
    return data, load_prompts(spec.data, place, indexed=indexed) if data is None else data.prompts


def _encoders(spec: RunSpec) -> tuple[Codec, bool]:
    """The autoencoder of the spec's teacher, and whether its network takes prompts."""
    if not isinstance(spec.teacher, CheckpointTeacher):
        return PIXELS, False
    facts = describe(spec.teacher, files.find(spec.teacher), "velocity")
    architecture = facts.architecture
    return facts.codec, isinstance(architecture, Convention) and bool(architecture.fields(facts.content))


def check(resolved: Resolved, data: DataSet | None, prompts: Prompts | None, *, takes_prompts: bool) -> None:
    """InputError if the spec's cache stage, if it has one, has nothing to store or too many files, or if text encoders
    are missing.

    data, prompts: of the spec, if it has some. takes_prompts: whether the network of the teacher is conditioned on
    prompts.
    """
    spec = resolved.spec
    if spec.cache is None:
        return
    stage, where = spec.stages[spec.cache], f"stages.{spec.cache}"
    assert isinstance(stage, CacheStage)
    if data is not None and cacheuse.stores_latents(resolved):
        counts = tuple(len(each.items) for each in data.buckets or [] if len(each.items))
        _refuse(layout.excess(Layout(len(data), stage.shard, counts), stage.block, "images", f"{where}.shard"))
    if takes_prompts:
        if cacheuse.may_store_prompts(spec):
            assert isinstance(spec.teacher, CheckpointTeacher)
            encoding.check(spec.teacher)
            own = Layout(0 if prompts is None else len(prompts), stage.prompts_shard)
            _refuse(layout.excess(own, stage.block, "prompts", f"{where}.prompts_shard"))
        return
    if stage.prompts:
        raise InputError(f"{where}.prompts: true given, but the network of the teacher takes no prompts; remove it")
    if not cacheuse.stores_latents(resolved):
        raise InputError(
            f"{where}: has no effect, because the network of the teacher takes no prompts, and no stage trains on "
            "images; remove it"
        )


def _refuse(wrong: str) -> None:
    if wrong:
        raise InputError(wrong)
