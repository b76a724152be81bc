"""The ways to divide trainings among given GPUs: what fits into their memory, and which of them is the fastest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd

from distill.execution.rehearsal import TrainingCosts
from distill.plans.costs import (
    ASSUMED,
    Assumptions,
    Machines,
    StepTime,
    StepWork,
    sent_bytes,
    step_time,
    updated_weights,
)
from distill.plans.device_kinds import DeviceKind, Precision
from distill.spec.model import LaunchSpec
from distill.training.choice import TrainedMemory, stage_of, ways

RESERVE = 0.1  # part of a GPU's memory for what is not predicted: CUDA itself, buffers, fragments
GATHERED = 10**9  # elements: how many gathered weights DeepSpeed keeps in stage 3 (stage3_max_live_parameters)
FLOAT = 4


@dataclass(frozen=True)
class TrainingJob:
    """A training whose layout is to be found."""

    costs: TrainingCosts
    batch_size: int
    images: int
    precision: Precision

    def share(self, procs: int) -> int:
        """Samples of a batch for each process."""
        share, rest = divmod(self.batch_size, procs)
        assert not rest, "the batch is divided evenly among the processes"
        return share


@dataclass(frozen=True)
class TrainingLayout:
    """How one training runs in a layout."""

    memory: Mapping[str, int]
    """bytes on each GPU by kind; "gathered": what ZeRO needs in the backward pass in addition"""
    step: StepTime
    """of one update of the student, with those of all other networks"""
    seconds: float
    """of the whole training"""

    @property
    def needed(self) -> int:
        """Bytes on each GPU."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class FittingLayout:
    """One way to run trainings one after another."""

    launch: LaunchSpec
    trainings: Mapping[str, TrainingLayout]

    @property
    def needed(self) -> int:
        """Bytes on each GPU, in the training that needs most."""
        return max(each.needed for each in self.trainings.values())

    @property
    def seconds(self) -> float:
        """Of all trainings."""
        return sum(each.seconds for each in self.trainings.values())


def available(kind: DeviceKind) -> float:
    """Bytes of each GPU for what is predicted."""
    return (1 - RESERVE) * kind.memory


def fitting_layouts(
    jobs: Mapping[str, TrainingJob],
    machines: Machines,
    assumed: Assumptions = ASSUMED,
    allowed: Callable[[LaunchSpec], bool] = lambda launch: True,
) -> list[FittingLayout]:
    """The ways to train for which the memory suffices, the fastest first. Empty if nothing fits.

    Of those that are equally fast, in two digits, the simplest comes first. For each way, the micro-batch is the
    largest that fits. allowed: whether the spec may have such a section `launch`.
    """
    plain = LaunchSpec(nodes=machines.nodes, procs=machines.per_node)
    every = [job.costs for job in jobs.values()]
    shared, teacher = any(each.shared for each in every), any(each.frozen and not each.shared for each in every)
    tried = (
        _largest(jobs, machines, way.model_copy(update={"activation_checkpointing": recompute}), assumed, allowed)
        for way in ways(plain, shared=shared, teacher=teacher)
        for recompute in (False, True)
        if all(recompute in each.steps for each in every)
        and (stage_of(way) is None or all(each.moments is None for each in every))
    )
    return sorted((each for each in tried if each is not None), key=lambda each: float(f"{each.seconds:.2g}"))


def layout_of(
    jobs: Mapping[str, TrainingJob], kind: DeviceKind, launch: LaunchSpec, assumed: Assumptions = ASSUMED
) -> FittingLayout:
    """What a given section `launch` needs, whether or not it fits. `micro_batch: auto` is taken as 1."""
    found = {}
    for name, job in jobs.items():
        own = job.share(launch.world_size)
        micro_batch = 1 if launch.micro_batch == "auto" else launch.micro_batch or own
        stage, needed = stage_of(launch), _memory(job.costs, launch, micro_batch)
        machines = Machines(kind, launch.nodes, launch.procs)
        work = _work(job.costs, launch, stage, own, own // micro_batch)
        step = step_time(work, machines, job.precision, assumed)
        found[name] = TrainingLayout(needed, step, step.total * job.images / job.batch_size)
    return FittingLayout(launch, found)


def work_of(job: TrainingJob, launch: LaunchSpec) -> StepWork:
    """What each process does in a step of a training."""
    own = job.share(launch.world_size)
    return _work(job.costs, launch, stage_of(launch), own, own // (launch.known_micro_batch or own))


def _largest(
    jobs: Mapping[str, TrainingJob],
    machines: Machines,
    way: LaunchSpec,
    assumed: Assumptions,
    allowed: Callable[[LaunchSpec], bool],
) -> FittingLayout | None:
    """The layout with the largest micro-batch that fits."""
    shares = [job.share(machines.procs) for job in jobs.values()]
    common = gcd(*shares)
    sizes: list[int | None] = [size for size in range(common, 0, -1) if common % size == 0]
    if len({*shares}) == 1:
        sizes[0] = None  # all in one pass, which needs no option
    else:
        sizes.insert(0, None)
    for size in sizes:
        launch = way.model_copy(update={"micro_batch": size})
        found = layout_of(jobs, machines.kind, launch, assumed)
        if found.needed <= available(machines.kind) and allowed(launch):
            return found
    return None


def process_memory(costs: TrainingCosts, launch: LaunchSpec, samples: int) -> dict[str, int]:
    """Bytes on the GPU of each process in training, by kind: those of `TrainedMemory.kinds`, and "activations".

    samples: of a micro-batch. `activation_offload` is not taken into account: with it, less is needed.
    """
    held = TrainedMemory(costs.trained, costs.still, [*costs.copies], costs.averages, costs.frozen, costs.moments)
    found = held.kinds(launch)
    found["activations"] = costs.steps[launch.activation_checkpointing].activations.of(samples)
    return found


def _memory(costs: TrainingCosts, launch: LaunchSpec, micro_batch: int) -> dict[str, int]:
    found = process_memory(costs, launch, micro_batch)
    trained = [sum(each) for each in costs.trained.values()]
    if (stage := stage_of(launch)) == 1:  # the whole gradients, until they are divided
        found["gathered"] = max(0, FLOAT * max(trained) - found["gradients"])
    elif stage == 3:
        found["gathered"] = FLOAT * min(max(trained), GATHERED)
    return found


def _work(costs: TrainingCosts, launch: LaunchSpec, stage: int | None, samples: int, micro_batches: int) -> StepWork:
    procs = launch.world_size
    gathered = costs.teacher_calls * micro_batches * costs.frozen if launch.divide_teacher else 0
    sent, updated = sent_bytes(stage, procs, 0, 0, micro_batches, gathered), 0
    for name, times in costs.updates.items():
        trained, still = costs.trained[name], costs.still[name]
        sent += times * sent_bytes(stage, procs, sum(trained), sum(trained) + sum(still), micro_batches)
        updated += times * updated_weights(stage, procs, trained)
    operations = samples * costs.steps[launch.activation_checkpointing].operations
    return StepWork(operations, sent, updated, launch.offload_optimizer)
