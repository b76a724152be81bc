"""The stages that sample a teacher: pairs and evaluations."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from distill.core.field_types import (
    MAX_SAMPLES,
    Fraction,
    FrozenModel,
    Name,
    PairCount,
    Samples,
    ShardPairs,
    SolverSteps,
    StepCount,
)
from distill.solvers import find_solver
from distill.spec.kinds import AnySolverName, ReferenceName, SolverName, per_velocity

OF_DATA, WITH_STATES = ("forward", "segments"), ("trajectories", "segments")  # paths of a pairs stage
STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
FINE, SAMPLES, SEED = 100, 100, 0  # defaults for finding optimal times: fine solver steps, samples, seed


def is_path(times: Sequence[float]) -> bool:
    """Whether these times go strictly down from 1 (noise) to 0 (data)."""
    return len(times) > 1 and times[0] == 1 and times[-1] == 0 and all(t > s for t, s in pairwise(times))


class PairsStage(FrozenModel):
    """Generate pairs (noise, data): solve the teacher's ODE, and store the start and the end of each path."""

    kind: Literal["pairs"]
    teacher: Name | None = None
    """train stage whose student is the teacher; null: the spec's teacher"""
    count: PairCount
    """number of pairs"""
    paths: Literal["backward", "forward", "segments", "trajectories"] = "backward"
    """backward: from noise to data; forward: from real data to noise; trajectories: backward, and store the states
    at `times` too; segments: from noised real data at one of `times` to the next one"""
    times: list[Fraction] | None = None
    """for trajectories and segments: decreasing from 1 (noise) to 0 (data), like [1, 0.5, 0]"""
    optimal_times: StepCount | None = None
    """for trajectories, instead of times: number of steps; their times are found by minimising the Euler error"""
    solver: SolverName = "heun"
    """solver of the teacher's ODE"""
    steps: SolverSteps = 16
    """number of solver steps (heun calls the network twice per step, except in the last)"""
    guidance_scale: Annotated[float, Field(ge=0, le=10_000)] = 1.0
    """classifier-free guidance scale of the teacher, with which the pairs are generated; 1: no guidance"""
    block: ShardPairs = 256
    """samples per batch of the solver; it affects the results, so it is set here and not in launch"""
    shard: ShardPairs = 4096
    """pairs per file, a multiple of block"""
    dtype: Literal["float32", "float16", "bfloat16", "uint8"] = "float32"
    """data type on disk; uint8: pixels in [-1, 1], rounded to multiples of 1/127.5"""
    store_noise: bool = False
    """store the noise too, in float32; false: generate it again from the seed; forward paths always store it"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: call the teacher under autocast"""

    @property
    def network_calls(self) -> float:
        """Calls of the teacher's network per pair, including those for guidance; for segments, the average."""
        solver = find_solver(self.solver)
        calls = solver.calls_inverting if self.paths == "forward" else solver.calls
        assert calls is not None, "checks.check lets no such stage through"
        segments = max(1, len(self.times or []) - 1) if self.paths == "segments" else 1
        return per_velocity(self.guidance_scale) * calls(self.steps) / segments

    @property
    def times_of_states(self) -> list[float] | None:
        """`times`, or with `optimal_times` uniform times as a placeholder: optimal ones are found during generation."""
        steps = self.optimal_times
        return self.times if steps is None else [(steps - i) / steps for i in range(steps + 1)]

    @property
    def num_states(self) -> int:
        """States that are stored per path, including its ends."""
        return len(self.times_of_states or [1, 0]) if self.paths == "trajectories" else 2

    def bytes_per_pair(self, shape: Sequence[int]) -> int:
        """Bytes of one pair on disk, without headers and labels. shape: shape of one sample."""
        states = 1 if self.paths == "segments" else self.num_states - 2
        stored = (1 + states) * STORED_BYTES[self.dtype]
        return math.prod(shape) * (stored + (4 if self.store_noise or self.paths == "forward" else 0))


class EvaluateStage(FrozenModel):
    """Measure the teacher and the students at several numbers of steps, and write the report."""

    kind: Literal["evaluate"]
    teacher: Name | None = None
    """train stage whose student is the teacher; null: the spec's teacher"""
    teacher_steps: list[StepCount] = [1, 2, 4, 8, 16]
    """numbers of Euler steps to measure the teacher with, in addition to fine_solver"""
    teacher_solvers: dict[AnySolverName, list[StepCount]] = {}
    """also measure the teacher with these solvers and numbers of steps, like {sa: [20, 40], restart: [18]}"""
    fine_solver: ReferenceName = "heun"
    """accurate solver; the teacher's samples with it are the reference for all rows"""
    fine_steps: StepCount = 16
    """number of steps of fine_solver"""
    students: dict[Name, list[StepCount]]
    """train stage: numbers of steps to measure its student with"""
    times: dict[Name, list[Literal["optimal"] | list[Fraction]]] = {}
    """also measure with other step times: {teacher: [optimal, [1, 0.6, 0]]}; optimal: those with the smallest error"""
    fine_students: list[Name] = []
    """students to measure with fine_solver, too; they must be velocity fields"""
    samples: Annotated[int, Field(ge=16, le=MAX_SAMPLES)] = 2500
    """number of samples per row; all metrics use the same samples"""
    block: Samples = 250
    """samples per batch; it affects the results"""
    guidance_scale: Annotated[float, Field(ge=0, le=10_000)] = 1.0
    """classifier-free guidance scale of the teacher; 1: no guidance"""
