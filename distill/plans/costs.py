"""How long a training step takes on how many GPUs, from numbers of operations and bytes. Needs no torch.

A step computes, communicates and updates the weights. Only a part of the communication is waited for: the rest happens
while the GPUs compute. Whatever is not known beforehand is a number in `Assumptions`. One measured step replaces the
most important one (`calibrated`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distill.plans.device_kinds import DeviceKind, Precision

FLOAT = 4  # bytes of a weight or gradient, which are float32 in every precision
UPDATED = 7 * FLOAT  # bytes that AdamW reads and writes per weight: 4 numbers are read, 3 are written
HOUR = 3600


@dataclass(frozen=True)
class Assumptions:
    """What only a measurement could tell, as shares between 0 and 1."""

    utilisation: float = 0.4
    """of the peak operations per second of a GPU, how many it reaches in a step"""
    bandwidth: float = 0.75
    """of the bytes per second of a link or a memory, how many are reached"""
    hidden: float = 0.5
    """of the time in which the GPUs compute, during how much of it they also communicate"""


ASSUMED = Assumptions()


@dataclass(frozen=True)
class Machines:
    """GPUs of one kind, `per_node` on each of `nodes` nodes; each has one process."""

    kind: DeviceKind
    nodes: int
    per_node: int

    @property
    def procs(self) -> int:
        return self.nodes * self.per_node

    @property
    def link(self) -> float:
        """Bytes per second that each process can send in an all-reduce, at best.

        Between nodes, the GPUs of a node send different parts at the same time, each over its own network card.
        """
        return self.kind.link if self.nodes == 1 else min(self.kind.link, self.per_node * self.kind.network)


@dataclass(frozen=True)
class StepWork:
    """What each process does in a training step."""

    operations: float
    """floating-point operations of all network calls"""
    sent: int
    """bytes, see `sent_bytes`"""
    updated: int
    """weights that it updates"""
    on_host: bool = False
    """the optimizer's state is in the memory of the node; each process reads it there as fast as a GPU could"""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step."""

    compute: float
    communication: float
    """of all communication"""
    waiting: float
    """the part of it that does not happen while the GPUs compute"""
    update: float
    """of the optimizer"""

    @property
    def total(self) -> float:
        return self.compute + self.waiting + self.update


def sent_bytes(
    zero_stage: int | None, procs: int, trained: int, weights: int, micro_batches: int = 1, gathered: int = 0
) -> int:
    """Bytes that each process sends in a step; it receives as many.

    trained: elements that are trained. weights: elements of all weights of trained networks; only stage 3 gathers them.
    gathered: bytes of divided weights of frozen networks, as often as they are gathered in a step.

    Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), section 7: a process that gathers, or reduces and scatters, n
    bytes sends (procs - 1) / procs n; an all-reduce is both. Without ZeRO, and in stage 0, gradients are all-reduced
    once. Stage 1 scatters gradients and gathers updated weights. Stages 2 and 3 scatter them in every micro-batch,
    because they keep no others. Stage 3 also gathers the weights in every micro-batch, for both passes, and not after
    the step.
    """
    passes: dict[int, tuple[int, int]] = {
        0: (1, 1),
        1: (1, 1),
        2: (micro_batches, 1),
        3: (micro_batches, 2 * micro_batches),
    }  # how often gradients are scattered and weights are gathered
    scatters, gathers = passes[zero_stage or 0]
    moved = FLOAT * (scatters * trained + gathers * (weights if zero_stage == 3 else trained)) + gathered
    return round(moved * (procs - 1) / procs)


def updated_weights(zero_stage: int | None, procs: int, sizes: Sequence[int]) -> int:
    """Weights that each process updates. sizes: elements of each trained parameter; ZeRO divides each of them."""
    return sum(-(-size // procs) for size in sizes) if zero_stage else sum(sizes)


def step_time(work: StepWork, machines: Machines, precision: Precision, assumed: Assumptions = ASSUMED) -> StepTime:
    """Seconds of a step of this work."""
    compute = work.operations / (machines.kind.peaks[precision] * assumed.utilisation)
    communication = work.sent / (machines.link * assumed.bandwidth)
    waiting = max(0.0, communication - assumed.hidden * compute)
    memory = machines.kind.host if work.on_host else machines.kind.bandwidth
    update = UPDATED * work.updated / (memory * assumed.bandwidth)
    return StepTime(compute, communication, waiting, update)


def calibrated(
    work: StepWork, machines: Machines, precision: Precision, seconds: float, assumed: Assumptions = ASSUMED
) -> Assumptions:
    """The assumptions with the utilisation at which `step_time` of this work is the measured time.

    ValueError if there is none, because the communication and the update alone would take as long.
    """
    predicted = step_time(work, machines, precision, assumed)
    left = seconds - predicted.update
    # Either all communication is hidden, or what is waited for falls by `hidden` for each second of computing.
    compute = max(left, 0.0)
    if predicted.communication > assumed.hidden * compute:
        compute = (left - predicted.communication) / (1 - assumed.hidden) if assumed.hidden < 1 else 0.0
    if compute <= 0:
        raise ValueError(
            f"a step of {seconds:g} s leaves no time to compute: the update takes {predicted.update:.3g} s and the "
            f"communication {predicted.communication:.3g} s"
        )
    return replace(assumed, utilisation=work.operations / (compute * machines.kind.peaks[precision]))


@dataclass(frozen=True)
class TrainingTime:
    """The speed of a training, and what it needs until its end."""

    images_per_second: float
    seconds: float
    gpu_hours: float


def training_time(step: StepTime, machines: Machines, batch_size: int, images: int) -> TrainingTime:
    """The speed of a training on `images` samples in steps of `batch_size` samples of all processes together."""
    speed = batch_size / step.total
    return TrainingTime(speed, images / speed, images / speed * machines.procs / HOUR)
