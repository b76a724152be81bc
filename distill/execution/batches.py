"""The batches of a train stage: read, decoded and given their conditions on the CPU, then encoded on the device."""

from dataclasses import dataclass, replace

import torch

from distill import pairs
from distill.data import DataSet, DataSource
from distill.flow.conditioning import ClassLabels, between, guidance_of
from distill.flow.draws import Rows, StepDraw
from distill.protocols import Batch, Codec, Cond, Conditioning, Source
from distill.runs.run_store import RunPaths
from distill.spec.model import TrainStage
from distill.training.world import ALONE, World


def of_stage(
    run: RunPaths,
    stage: TrainStage,
    *,
    seed: int,
    data: DataSet | None,
    conditioning: Conditioning,
    teacher_digest: str | None,
    world: World = ALONE,
) -> tuple[Source, dict[str, str]]:
    """The source of the batches of a train stage, on the CPU, and the digests of its pairs. Every rank must call this.

    data: real data of the batches. If it is in pixels, `EncodedBatches` encodes its batches.
    conditioning: of the trained networks.
    teacher_digest: digest of the teacher that must have made the pairs; None: any.
    """
    labels = conditioning.count is not None
    real = None
    if data is not None:
        found = DataSource(data, stage.batch_size, seed, labels=labels, sizes=labels and not _is_plain(conditioning))
        real = CollatedBatches.of(found, conditioning, seed)
    if not stage.pair_shares:
        assert real is not None, "checks.check lets no such stage through"
        return real, {}
    counts = stage.rows_of_pairs
    folders = [run.stage(name).pairs for name in stage.pair_shares]
    sets = [pairs.PairSet.open(folder, teacher_digest, world.rank, world.size) for folder in folders]
    world.meet("after the checksums of the pairs")  # each rank has verified a part of them
    sources = [pairs.PairSource(each, count, seed) for each, count in zip(sets, counts, strict=True)]
    source: Source = sources[0] if len(sources) == 1 else pairs.Mixed(sources, counts)
    source = CollatedBatches.of(source, conditioning, seed)
    digests = {"pairs": " ".join(each.manifest.digest for each in sets)}
    return source if real is None else pairs.Beside(source, real), digests


@dataclass(frozen=True)
class CollatedBatches:
    """Batches whose class indices, and sizes of images, are converted to the conditions of a network, on the CPU."""

    source: Source
    conditioning: Conditioning
    seed: int

    @classmethod
    def of(cls, source: Source, conditioning: Conditioning, seed: int) -> Source:
        """`source` with conditions, or `source` itself if its indices are the conditions."""
        return source if _is_plain(conditioning) else cls(source, conditioning, seed)

    def batch(self, step: int, rows: Rows) -> Batch:
        found = self.source.batch(step, rows)
        conditions = (self._collated(each, step, rows) for each in (found.cond, found.data_cond))
        return replace(found, cond=next(conditions), data_cond=next(conditions))

    def _collated(self, cond: Cond, step: int, rows: Rows) -> Cond:
        if not cond:
            return cond
        collated = self.conditioning.collate(cond["class_labels"], cond.get("sizes"))
        if guidance_of(self.conditioning) is None:
            return collated
        draw = StepDraw(self.seed, step, 0, rows)  # each sample gets a guidance scale
        uniform = draw.uniform("guidance scale of the batch", cond["class_labels"])
        return between(self.conditioning, collated, uniform)


def _is_plain(conditioning: Conditioning) -> bool:
    """Whether class indices are the conditions, or there are none."""
    return conditioning.count is None or isinstance(conditioning, ClassLabels)


@dataclass(frozen=True)
class EncodedBatches:
    """Batches whose real data is converted from pixels to the samples of a network, on `device`, where it stays."""

    source: Source
    codec: Codec
    device: torch.device

    @classmethod
    def of(cls, source: Source, codec: Codec, device: torch.device) -> Source:
        """`source` with encoded data, or `source` itself if the networks work on pixels."""
        return source if codec.is_identity else cls(source, codec, device)

    def batch(self, step: int, rows: Rows) -> Batch:
        found = self.source.batch(step, rows)
        if found.data is None:
            return found
        return replace(found, data=self.codec.encode(found.data.to(self.device, non_blocking=True)))
