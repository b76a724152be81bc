"""The ways to divide a training among given GPUs: what fits into their memory, and which of them is the fastest."""

from collections.abc import Mapping
from dataclasses import dataclass

from distill.execution.model_costs import NetworkCosts, process_memory
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
from distill.plans.device_kinds import Precision
from distill.spec.model import LaunchSpec
from distill.training.choice import stage_of, ways

RESERVE = 0.1  # part of a GPU's memory for what is not predicted: CUDA itself, buffers, fragments
GATHERED = 10**9  # elements: how many gathered weights DeepSpeed keeps in stage 3 (stage3_max_live_parameters)
FLOAT = 4


@dataclass(frozen=True)
class TrainingJob:
    """What a recipe does for one update of the student, and with which networks."""

    networks: Mapping[bool, Mapping[str, NetworkCosts]]
    """the trained networks by name, one of them "student"; under True, with recomputed activations"""
    batch_size: int
    forwards: Mapping[str, int]
    """forward passes without a backward pass for each sample, by trained network; "teacher" costs as the student"""
    trainings: Mapping[str, int]
    """forward and backward passes for each sample, by trained network"""
    updates: Mapping[str, int]
    """updates of each trained network"""
    kept: Mapping[str, int]
    """see `process_memory`"""
    frozen: int = 0
    """bytes of the teacher's weights"""
    shared: bool = False
    """the trained networks are adapters of these weights, which are not divided then"""
    averages: int = 1

    def operations(self, *, recompute: bool) -> int:
        """Floating-point operations for each sample."""
        costs = self.networks[recompute]
        passes = sum(
            times * costs["student" if name == "teacher" else name].forward for name, times in self.forwards.items()
        )
        return passes + sum(times * costs[name].training for name, times in self.trainings.items())


@dataclass(frozen=True)
class FittingLayout:
    """One way to train."""

    launch: LaunchSpec
    memory: Mapping[str, int]
    """bytes on each GPU by kind; "gathered": what ZeRO needs in the backward pass in addition"""
    step: StepTime
    """of one update of the student, with those of all other networks"""

    @property
    def needed(self) -> int:
        """Bytes on each GPU."""
        return sum(self.memory.values())


def fitting_layouts(
    job: TrainingJob, machines: Machines, precision: Precision, assumed: Assumptions = ASSUMED
) -> list[FittingLayout]:
    """The ways to train for which the memory suffices, the fastest first. Empty if nothing fits.

    Of those that are equally fast, in two digits, the simplest comes first. For each way, the micro-batch is the
    largest that fits.
    """
    available = (1 - RESERVE) * machines.kind.memory
    plain = LaunchSpec(nodes=machines.nodes, procs=machines.per_node)
    tried = (
        _largest(
            job, machines, way.model_copy(update={"activation_checkpointing": recompute}), precision, assumed, available
        )
        for way in ways(plain, shared=job.shared, teacher=job.frozen > 0 and not job.shared)
        for recompute in (False, True)
    )
    return sorted((each for each in tried if each is not None), key=lambda each: float(f"{each.step.total:.2g}"))


def _largest(
    job: TrainingJob, machines: Machines, way: LaunchSpec, precision: Precision, assumed: Assumptions, available: float
) -> FittingLayout | None:
    own, rest = divmod(job.batch_size, machines.procs)
    assert not rest, "the batch is divided evenly among the processes"
    for micro_batch in (size for size in range(own, 0, -1) if own % size == 0):
        launch = way.model_copy(update={"micro_batch": None if micro_batch == own else micro_batch})
        memory = _memory(job, launch, micro_batch)
        if sum(memory.values()) <= available:
            step = step_time(_work(job, launch, own, own // micro_batch), machines, precision, assumed)
            return FittingLayout(launch, memory, step)
    return None


def _memory(job: TrainingJob, launch: LaunchSpec, micro_batch: int) -> dict[str, int]:
    networks = job.networks[launch.activation_checkpointing]
    found = process_memory(networks, launch, micro_batch, kept=job.kept, averages=job.averages, frozen=job.frozen)
    trained = [sum(each.trained) for each in networks.values()]
    if (stage := stage_of(launch)) == 1:  # the whole gradients, until they are divided
        found["gathered"] = FLOAT * max(trained) - found["gradients"]
    elif stage == 3:
        found["gathered"] = FLOAT * min(max(trained), GATHERED)
    return found


def _work(job: TrainingJob, launch: LaunchSpec, samples: int, micro_batches: int) -> StepWork:
    networks, stage, procs = job.networks[launch.activation_checkpointing], stage_of(launch), launch.world_size
    gathered = job.forwards.get("teacher", 0) * micro_batches * job.frozen if launch.divide_teacher else 0
    sent, updated = sent_bytes(stage, procs, 0, 0, micro_batches, gathered), 0
    for name, times in job.updates.items():
        trained, still = networks[name].trained, networks[name].still
        sent += times * sent_bytes(stage, procs, sum(trained), sum(trained) + sum(still), micro_batches)
        updated += times * updated_weights(stage, procs, trained)
    operations = samples * job.operations(recompute=launch.activation_checkpointing)
    return StepWork(operations, sent, updated, launch.offload_optimizer)
