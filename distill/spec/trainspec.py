"""Validation of the network and the lengths of a train stage. Does not import torch."""

from collections.abc import Iterator

from distill.spec import optimizerspec
from distill.spec.model import (
    MlpSpec,
    PairsStage,
    RunSpec,
    TrainStage,
    UNetSpec,
)
from distill.spec.resolved import Resolved

MAX_PARAMETERS = 100_000_000_000
MAX_SNAPSHOTS = 1000  # each has a file for each length, as large as the weights


def parameters(network: UNetSpec | MlpSpec) -> int:
    """Rough number of parameters of a new network, from its largest layers; the network is not built."""
    if isinstance(network, MlpSpec):
        return network.width**2 * network.depth
    down, up = 2 * network.layers_per_block, 3 * (network.layers_per_block + 1)  # 3 x 3 convolutions per resolution
    return sum(9 * channels**2 * (down + up) for channels in network.channels)


def network(found: Resolved, stage: TrainStage, network: UNetSpec | MlpSpec, where: str) -> Iterator[str]:
    """The mistakes in the spec of a new network: whether it can be built and fits the shape of the samples."""
    if stage.dropout is not None:
        yield f"{where}: the stage's dropout has no effect on a new network; remove it, or set network.dropout"
    spec, vectors = found.spec, found.has_exact_teacher(stage)
    sides = spec.data.side_lengths
    if spec.data.has_videos:
        yield f"{where}: a new network is for images or vectors, but the data has videos; start from a teacher"
        return
    if (size := parameters(network)) > MAX_PARAMETERS:
        yield f"{where}: about {size:,} parameters, more than the maximum of {MAX_PARAMETERS:,}; make it smaller"
    if isinstance(network, MlpSpec):
        if sides:
            yield f"{where}: an mlp is for vectors, but data of kind {spec.data.kind} has images; use kind: unet"
        return
    if vectors:
        yield f"{where}: a unet is for images, but the teacher makes vectors; use kind: mlp"
    if spec.data.has_points:
        yield f"{where}: a unet is for images, but data of kind {spec.data.kind} has points in the plane; use kind: mlp"
    if not network.channels:
        yield f"{where}.channels: empty; give the number of channels of each resolution, finest first"
    for channels in network.channels:
        if channels % network.norm_groups:
            yield f"{where}.channels: {channels} is not a multiple of norm_groups ({network.norm_groups})"
    halvings = max(len(network.channels) - 1, 0)
    for side in [each for each in sides if each % 2**halvings][:2]:
        yield (
            f"{where}.channels: {halvings + 1} resolutions halve the images {halvings} times, but their side of "
            f"{side} is not divisible by {2**halvings}; give fewer resolutions"
        )


def buckets(found: Resolved) -> Iterator[str]:
    """The mistakes in data.buckets: they apply to training on data, and everything else has one size."""
    if not found.spec.data.in_buckets:
        return
    reads = {name: stage for name, stage in found.spec.stages.items() if "data" in found.uses(name)}
    pairs = [name for name, stage in reads.items() if isinstance(stage, PairsStage)]
    beside = [name for name in reads if name in found.recipes and "pairs" in found.needs(name)]
    for name in pairs:
        yield f"data.buckets: the pairs of stages.{name} start from the data, and pairs have one size; remove buckets"
    for name in beside:
        yield f"data.buckets: stages.{name} trains on data and pairs, and pairs have one size; remove buckets"
    if not pairs and not any(isinstance(stage, TrainStage) for stage in reads.values()):
        yield "data.buckets: no stage trains on the data, so they have no effect; remove them"


def lengths(spec: RunSpec, stage: TrainStage, rows_together: int, where: str) -> Iterator[str]:
    """The mistakes in the lengths of a stage: images, batch size, micro-batch, warm-up, averages, checkpoints."""
    batch, procs = stage.batch_size, spec.launch.world_size
    micro = spec.launch.known_micro_batch  # with "auto", only fitting sizes are tried later
    samples = micro or batch // procs
    if stage.images % batch:
        nearest = max(batch, round(stage.images / batch) * batch)
        yield f"{where}.images: {stage.images} is not a multiple of batch_size ({batch}); nearest: {nearest}"
    if batch % procs:
        field = "launch.procs" if spec.launch.nodes == 1 else "launch.nodes"
        yield f"{field}: {where}.batch_size ({batch}) is not a multiple of the {procs} processes; change one of them"
    elif micro is not None and batch // procs % micro:
        each = f"{batch}" if procs == 1 else f"{batch} / {procs} processes = {batch // procs}"
        yield f"launch.micro_batch: {micro} does not divide {where}.batch_size ({each})"
    elif samples % rows_together:
        yield (
            f"{where}: {stage.recipe} couples samples in blocks of {rows_together}, and micro-batches of {samples} "
            "do not contain whole blocks; make batch_size / processes, or launch.micro_batch, a multiple of "
            f"{rows_together}"
        )
    yield from optimizerspec.mistakes(stage.optimizer, stage.images, f"{where}.optimizer")
    yield from _averages(stage, where)
    if stage.checkpoint.images is None and stage.checkpoint.minutes is None:
        yield f"{where}.checkpoint: images and minutes are both null, so nothing would be saved; give one"


def _averages(stage: TrainStage, where: str) -> Iterator[str]:
    """The mistakes in the averages of a stage's weights."""
    for name, values in (("ema_half_lives", stage.ema_half_lives), ("ema_lengths", stage.ema_lengths)):
        if len(set(values)) != len(values):
            yield f"{where}.{name}: {values} contains a value twice"
    for half in stage.ema_half_lives:
        if half < 1:
            yield (
                f"{where}.ema_half_lives: {half:g} of an image; give at least 1. Lengths relative to the training "
                "belong in ema_lengths"
            )
    if stage.export != "raw" and stage.export not in stage.averages:
        valid = ", ".join(["raw", *(f"{each:g}" for each in stage.averages)])
        yield f"{where}.export: {stage.export:g} is not one of ema_half_lives and ema_lengths; valid: {valid}"
    if stage.ema_snapshots is None:
        return
    if not stage.ema_lengths:
        yield f"{where}.ema_snapshots: has no effect without ema_lengths; add ema_lengths: [0.05, 0.1], or remove it"
    if stage.ema_snapshots > stage.images:
        yield f"{where}.ema_snapshots: {stage.ema_snapshots} of {stage.images} images; give at most half of them"
    if (count := stage.images // stage.ema_snapshots) > MAX_SNAPSHOTS:
        yield f"{where}.ema_snapshots: makes {count:,} snapshots; give more images, for at most {MAX_SNAPSHOTS:,}"
