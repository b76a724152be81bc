"""The rows of an evaluation: which network is sampled with which solver, in how many steps, along which times."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from distill.core import printing
from distill.core.errors import InputError
from distill.flow.times import uniform_grid
from distill.solvers import find_solver
from distill.spec import evalspec
from distill.spec.guidancespec import UNCHANGED, FieldSettings
from distill.spec.kinds import FITTED, per_velocity
from distill.spec.model import EvaluateStage
from distill.students import fitted, step_times
from distill.students.fitted import FittedSolver
from distill.students.loaded import LoadedStudent
from distill.students.sampling import times_of
from distill.teachers import LoadedTeacher


@dataclass(frozen=True)
class Plan:
    """One row to measure."""

    network: str
    role: Literal["teacher", "student"]
    solver: str
    steps: int
    fine: bool = False
    along: str = ""  # which times, in words, as in `Row`; "": the usual ones
    times: tuple[float, ...] | None = None  # of the steps, from noise to 0; None: uniform from 1
    fit: FittedSolver | None = field(default=None, repr=False)  # if its solver was fitted to the teacher
    tolerance: float | None = field(default=None, repr=False)  # of dopri5, whose `steps` are 0
    guidance_scale: float | None = field(default=None, repr=False)  # of the teacher; None: that of the stage

    @property
    def slug(self) -> str:
        name = "teacher" if self.role == "teacher" else f"student-{self.network}"
        along = "" if not self.along else f"-{self.along}" if self.along == "optimal" else f"-{_short(self.along)}"
        accuracy = self.steps if self.tolerance is None else f"{self.tolerance:g}"
        scale = "" if self.guidance_scale is None else f"-guidance-{self.guidance_scale:g}"
        return f"{name}-{self.solver}-{accuracy}{along}{scale}"

    @property
    def is_shared(self) -> bool:
        """Whether the row does not depend on a student, so that other evaluations in the store can use it."""
        return self.role == "teacher" and not self.fine


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def fine_plan(stage: EvaluateStage) -> Plan:
    """The row of the teacher with the fine solver, whose samples are the reference of all rows."""
    steps = stage.fine_steps if stage.fine_tolerance is None else 0
    return Plan("teacher", "teacher", stage.fine_solver, steps, fine=True, tolerance=stage.fine_tolerance)


def shortest(plan: Plan) -> Plan:
    """The same row with as few steps as possible."""
    if plan.fit is not None:
        return plan
    if plan.tolerance is not None:
        return replace(plan, solver="euler", steps=1, tolerance=None)
    is_solver = plan.role == "teacher" or plan.fine
    return replace(plan, steps=find_solver(plan.solver).least_steps if is_solver else 1, times=None)


def plans(
    stage: EvaluateStage,
    teacher: LoadedTeacher,
    students: Mapping[str, LoadedStudent],
    store: Path,
    device: torch.device,
) -> list[Plan]:
    """The rows of an evaluation: the teacher with Euler, the baselines and the fine solver; students as they are made.

    For each network, rows with other step times come after its usual ones. store: where times and solvers are kept.
    """
    times = _Times(stage, store, device)
    rows = [Plan("teacher", "teacher", "euler", steps) for steps in stage.teacher_steps]
    rows += [*times.along(rows, teacher), *_by_solvers(stage, teacher, students, store), fine_plan(stage)]
    rows += [replace(fine_plan(stage), fine=False, guidance_scale=each) for each in stage.guidance_scales]
    for name, steps in stage.students.items():
        student = students[name]
        usual = [Plan(name, "student", student.sampler, n, times=_times(student, n)) for n in steps]
        rows += [*usual, *times.along(usual, student)]
        if name in stage.fine_students:
            rows.append(replace(fine_plan(stage), network=name, role="student"))
    return rows


def _times(student: LoadedStudent, steps: int) -> tuple[float, ...] | None:
    """The usual times of a student; None: uniform ones from 1 to 0."""
    found = times_of(student, steps)
    is_uniform = not student.t_grids and torch.equal(found, uniform_grid(steps))
    return None if is_uniform else tuple(found.tolist())


def _by_solvers(
    stage: EvaluateStage, teacher: LoadedTeacher, students: Mapping[str, LoadedStudent], store: Path
) -> Iterator[Plan]:
    """The teacher with other solvers, also at the students' numbers of network calls, and with those fitted to it."""
    samplers, scale = {name: each.sampler for name, each in students.items()}, stage.guidance_scale
    for solver, steps in evalspec.solver_rows(stage, samplers):
        yield Plan("teacher", "teacher", solver, steps)
    plain = stage.field_settings == FieldSettings(scale)  # a solver is fitted with guidance_scale alone
    for nfe in evalspec.nfe_of_students(stage, samplers) if stage.baselines and plain else []:
        steps, rest = divmod(nfe, per_velocity(scale))
        fit = _fit(store, teacher, steps, scale) if rest == 0 else None
        if fit is not None and all(each.fitted.get(steps) != fit.rows for each in students.values()):
            yield Plan("teacher", "teacher", FITTED, steps, fit=fit)


def _fit(store: Path, teacher: LoadedTeacher, steps: int, guidance_scale: float) -> FittedSolver | None:
    """The solver that the store has for the teacher; None if there is none, or if its file is damaged."""
    try:
        return fitted.load(store, teacher.digest, steps, guidance_scale)
    except InputError as error:
        printing.warn(f"{error}; without it, the fitted solver is no baseline")
        return None


@dataclass(frozen=True)
class _Times:
    """Finds the step times that a stage asks for."""

    stage: EvaluateStage
    store: Path
    device: torch.device

    def along(self, usual: list[Plan], network: LoadedTeacher | LoadedStudent) -> Iterator[Plan]:
        """The rows of a network with the other step times that the stage asks for. usual: its rows with usual times."""
        for asked in self.stage.times.get(usual[0].network, []) if usual else []:
            if asked == "optimal":
                settings = self.stage.field_settings if isinstance(network, LoadedTeacher) else UNCHANGED
                for plan in usual:
                    times = step_times.optimal_times(network, self.store, plan.steps, self.device, settings)
                    yield replace(plan, along="optimal", times=tuple(times))
            else:
                along = ", ".join(f"{t:g}" for t in asked)
                yield replace(usual[0], steps=len(asked) - 1, along=along, times=tuple(asked))
