"""Chooses how networks are divided among the processes, by the options in `launch`, or by their memory."""

from collections.abc import Mapping
from dataclasses import dataclass

from distill.spec.model import LaunchSpec
from distill.training import memory
from distill.training.plain import PLAIN
from distill.training.sharding import Sharding, Sizes
from distill.training.zero import Zero

# Ways to train in less and less memory, the fastest first. The last one keeps the optimizer state on the host.
WAYS: tuple[Mapping[str, int | bool], ...] = (
    {},
    {"zero_stage": 1},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"zero_stage": 3, "divide_teacher": True},
    {"zero_stage": 3, "divide_teacher": True, "offload_optimizer": True},
)
ALONE: tuple[Mapping[str, int | bool], ...] = ({}, {"zero_stage": 1, "offload_optimizer": True})  # for one process


@dataclass(frozen=True)
class TrainedMemory:
    """What a process has in memory, besides activations. See `memory.predict`.

    frozen: bytes of all other weights: of the teacher, and of networks that are not trained.
    """

    sizes: Sizes
    still: Sizes
    copies: list[str]
    averages: int
    frozen: int
    moments: int | None = None

    def kinds(self, launch: LaunchSpec) -> dict[str, int]:
        """Predicted bytes on the device of each process: the kinds of `memory.predict`, and "frozen"."""
        sharding, procs = choose_sharding(launch), launch.world_size
        found = memory.predict(self.sizes, self.copies, self.averages, procs, sharding, self.still, self.moments)
        if launch.offload_optimizer:
            found["optimizer"] = 0
        return {**found, "frozen": self.frozen // procs if sharding.divides_frozen else self.frozen}

    def bytes(self, launch: LaunchSpec) -> int:
        """Predicted bytes on the device of each process, without activations."""
        return sum(self.kinds(launch).values())


def choose_sharding(launch: LaunchSpec) -> Sharding:
    """DeepSpeed if an option needs it (`zero_stage`, `divide_teacher`), else plain PyTorch."""
    if launch.zero_stage is None and not launch.divide_teacher:
        return PLAIN
    return Zero(launch.zero_stage, launch.divide_teacher, launch.zero_persistence_threshold, launch.offload_optimizer)


def stage_of(launch: LaunchSpec) -> int | None:
    """The ZeRO stage; None: without DeepSpeed."""
    return launch.zero_stage


def ways(launch: LaunchSpec, *, shared: bool, teacher: bool) -> list[LaunchSpec]:
    """`launch` with each of the ways to divide the networks, those that need more memory first.

    shared: the networks share the weights of the teacher, so these cannot be divided. teacher: the recipe calls a
    teacher with weights of its own.
    """
    found: list[LaunchSpec] = []
    for way in WAYS if launch.world_size > 1 else ALONE:
        options = {name: value for name, value in way.items() if teacher or name != "divide_teacher"}
        each = launch.model_copy(update=options)
        if each not in found and not (shared and each.zero_stage == 3):
            found.append(each)
    return found


def fitting(launch: LaunchSpec, needed: TrainedMemory, available: int) -> tuple[LaunchSpec, int]:
    """(launch with the fastest way to divide the networks for which they fit, bytes that each process needs).

    available: bytes for all but activations. If no way fits, the one with the least memory is returned.
    """
    ways = WAYS if launch.world_size > 1 else ALONE
    tried = [launch.model_copy(update=dict(way)) for way in ways]
    found = [(each, needed.bytes(each)) for each in tried]
    return next((each for each in found if each[1] <= available), found[-1])
