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
    FunctionName,
    Line,
    Name,
    PairCount,
    Samples,
    ShardPairs,
    SolverSteps,
    StepCount,
    Tolerance,
)
from distill.spec.guidancespec import FieldSettings, GuidanceSpec
from distill.spec.kinds import AUTO, FITTED, AnySolverName, PairsSolverName, ReferenceName, SolverName, per_velocity

OWN_COLUMNS = {"KID", "precision", "recall", "rms", "straightness"}  # of every evaluation
RARE = "rare words"  # the group of prompts that rare_words asks for; names of other groups have no space
OF_DATA, WITH_STATES = ("forward", "segments"), ("trajectories", "segments")  # paths of a pairs stage
STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
DEFAULT_SOLVER = "heun"  # of pairs
TOLERANCE = 0.01  # of pairs, from exact ones: RMS difference, relative to the RMS of the pairs
FINE_STEPS = 16  # default of an evaluation
FINE, SAMPLES, SEED = 100, 100, 0  # defaults for finding optimal times: fine solver steps, samples, seed


EpsilonScale = Annotated[float, Field(ge=0.5, le=2)]


def uniform_times(steps: int) -> list[float]:
    """The times of `steps` equal steps from 1 (noise) to 0 (data)."""
    return [(steps - i) / steps for i in range(steps + 1)]


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
    solver: PairsSolverName = DEFAULT_SOLVER
    """solver of the teacher's ODE; auto: the one with the fewest network calls that meets `tolerance`; bns: a solver
    that is fitted to the teacher, see `distill schedule --fit`"""
    tolerance: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    """for solver: auto: largest difference from exact pairs (RMS, relative to that of the pairs); null: 0.01"""
    steps: SolverSteps = 16
    """number of solver steps (heun calls the network twice per step, except in the last)"""
    guidance_scale: Annotated[float, Field(ge=0, le=10_000)] = 1.0
    """classifier-free guidance scale of the teacher, with which the pairs are generated; 1: no guidance"""
    guidance: GuidanceSpec | None = None
    """another form of guidance, or guidance at some times only; null: classifier-free guidance at all times"""
    epsilon_scale: EpsilonScale = 1.0
    """divide the teacher's noise predictions by this, like 1.005 (epsilon scaling); 1: leave them"""
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
    def field_settings(self) -> FieldSettings:
        """How the teacher's velocity field is changed."""
        return FieldSettings(self.guidance_scale, self.guidance, self.epsilon_scale)

    @property
    def network_calls(self) -> float:
        """Calls of the teacher's network per pair, including those for guidance; for segments, the average.

        For `solver: auto` they are those of the default solver, as an estimate. If guidance has an interval, they are
        those of a teacher that is defined at all times from 0 to 1.
        """
        noise_first = uniform_times(self.steps)
        return self.network_calls_along(noise_first[::-1] if self.paths == "forward" else noise_first)

    def network_calls_along(self, t_grid: Sequence[float]) -> float:
        """The same on the teacher's own grid of linear-path times, which increases if paths are forward."""
        segments = max(1, len(self.times or []) - 1) if self.paths == "segments" else 1
        if self.solver == FITTED:
            return float(per_velocity(self.guidance_scale) * (len(t_grid) - 1))
        solver = DEFAULT_SOLVER if self.solver == AUTO else self.solver
        return self.field_settings.network_calls(solver, t_grid) / segments

    @property
    def chosen_tolerance(self) -> float:
        """The tolerance of `solver: auto`."""
        return TOLERANCE if self.tolerance is None else self.tolerance

    def solved_by(self, solver: str, steps: int) -> "PairsStage":
        """The stage with a solver in place of `auto`."""
        return self.model_copy(update={"solver": solver, "steps": steps, "tolerance": None})

    @property
    def times_of_states(self) -> list[float] | None:
        """`times`, or with `optimal_times` uniform times as a placeholder: optimal ones are found during generation."""
        steps = self.optimal_times
        return self.times if steps is None else uniform_times(steps)

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
    baselines: list[SolverName] = ["euler", "ab3", "unipc2"]
    """solvers with which the teacher is measured at each student's number of network calls, to compare the student
    with; also the solvers that were fitted to the teacher (`distill schedule --fit`), unless the list is empty"""
    fine_solver: ReferenceName = "heun"
    """accurate solver; the teacher's samples with it are the reference for all rows"""
    fine_steps: StepCount = FINE_STEPS
    """number of steps of fine_solver"""
    fine_tolerance: Tolerance | None = None
    """for fine_solver: dopri5, instead of fine_steps: largest error of a step, relative to 1 + |x|, like 1e-4"""
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
    guidance: GuidanceSpec | None = None
    """another form of guidance, or guidance at some times only; null: classifier-free guidance at all times"""
    epsilon_scale: EpsilonScale = 1.0
    """divide the teacher's noise predictions by this, like 1.005 (epsilon scaling); 1: leave them"""
    guidance_scales: list[Annotated[float, Field(ge=0, le=10_000)]] = []
    """also measure the teacher with fine_solver at these guidance scales, to compare them with guidance_scale"""
    metrics: list[FunctionName] = []
    """also measure with functions of your own, each as module:function: of images and prompts, that return scores or
    features; see distill/evaluation/metrics/own.py"""
    medians: list[FunctionName] = []
    """those of metrics of whose scores the median is shown, not the mean"""
    samples_per_prompt: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    """samples with each prompt, if there are enough prompts; 2 or more are needed to measure their diversity"""
    pictured: list[Line] = []
    """prompts of the data whose samples are shown, beside a real image of each; empty: the first prompts"""
    prompt_groups: dict[Name, list[Line]] = {}
    """also show the scores of metrics for prompts with certain words, like {colours: [red, blue], counts: [two]}"""
    rare_words: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    """also show them for prompts with a word that at most so many prompts of the data have"""

    @property
    def field_settings(self) -> FieldSettings:
        """How the teacher's velocity field is changed."""
        return self.settings_at(None)

    def settings_at(self, guidance_scale: float | None) -> FieldSettings:
        """The same with another guidance scale; None: with that of the stage."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return FieldSettings(scale, self.guidance, self.epsilon_scale)
