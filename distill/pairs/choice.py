"""Chooses the solver of the pairs for `solver: auto`: the one with the fewest network calls that is accurate enough.

The first pairs are solved by `ab3` with more and more steps, until twice as many change them by at most a tenth of the
tolerance. Their ends are the reference. For each candidate, the smallest number of steps is found whose ends differ
from the reference by at most the tolerance. Differences are root mean squares (RMS), relative to that of the ends. They
are assumed to decrease with the number of steps, so that bisection finds it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from distill.core import records
from distill.core.atomic import write_atomic
from distill.core.errors import RunError
from distill.core.field_types import FrozenModel
from distill.core.stop import StopRequest
from distill.pairs import accuracy
from distill.pairs.generate import velocity
from distill.pairs.manifest import Manifest
from distill.pairs.paths import Real
from distill.protocols import VelocityField
from distill.solvers import find_solver
from distill.spec.model import PairsStage
from distill.spec.pairspec import steps_to_try
from distill.spec.samplingspec import DEFAULT_SOLVER
from distill.teachers import LoadedTeacher

FILE = "solver.json"
CANDIDATES = ("euler", "ab2", "ab3", "unipc2", DEFAULT_SOLVER)
SAMPLE = 256  # pairs that are solved
REFERENCE, STEPS, DOUBLINGS = "ab3", 32, 5  # solver, its steps at least, and how often they are doubled at most


class ChosenSolver(FrozenModel):
    """The solver that was chosen for a set of pairs. Stored beside the set."""

    teacher_digest: str
    paths: str
    guidance_scale: float
    times: list[float] | None
    precision: str
    settings: str
    """further settings of the teacher's velocity field, see `FieldSettings.identity`"""
    tolerance: float
    solver: str
    steps: int
    error: float
    """relative RMS difference of its ends from the reference"""
    calls: float
    """network calls per pair"""
    calls_of_default: float | None
    """network calls per pair of Heun, the default solver, at the same tolerance; null: it was not reached"""
    calls_of_choice: float
    """network calls that were made to choose it"""

    def describe(self, count: int) -> str:
        """The choice in one sentence, with the network calls that it saves for `count` pairs."""
        said = (
            f"solver: auto uses {self.solver} with {self.steps} steps: its pairs differ from exact ones by "
            f"{self.error:.2%} (RMS), with {self.calls:g} network calls per pair"
        )
        spent = f"choosing it took {self.calls_of_choice:,.0f} calls"
        if self.calls_of_default is None or self.calls_of_default == self.calls:
            return f"{said}; {spent}"
        saved = count * (self.calls_of_default - self.calls)
        return f"{said}; {DEFAULT_SOLVER} needs {self.calls_of_default:g}, so {saved:,.0f} calls are saved; {spent}"


SCHEMA: records.Schema[ChosenSolver] = records.Schema(ChosenSolver)


def choose(
    teacher: LoadedTeacher,
    stage: PairsStage,
    planned: Callable[[PairsStage], Manifest],
    real: Real | None,
    device: torch.device,
    stop: StopRequest,
) -> ChosenSolver:
    """Choose the solver of a stage with `solver: auto`. planned: returns the manifest of a stage.

    RunError if no number of steps is accurate enough, or if the ends are not finite.
    """
    search = _Search(velocity(teacher, stage), stage, planned, real, device, stop)
    exact = search.reference()
    found: dict[str, tuple[int, float]] = {}
    for solver in CANDIDATES:
        if stage.paths != "forward" or find_solver(solver).calls_inverting is not None:
            least = search.least(solver, exact)
            if least is not None:
                found[solver] = least
    if not found:
        raise RunError(
            f"solver: auto found no solver that makes pairs within tolerance: {search.tolerance:g} in at most "
            f"{steps_to_try(stage)[-1]} steps; nothing was written. Increase the tolerance, or name a solver"
        )
    best = min(found, key=lambda name: (search.calls(name, found[name][0]), found[name][1]))
    steps, error = found[best]
    return ChosenSolver(
        teacher_digest=teacher.digest,
        paths=stage.paths,
        guidance_scale=stage.guidance_scale,
        times=stage.times,
        precision=stage.precision,
        settings=teacher.identity_of(stage.field_settings),
        tolerance=search.tolerance,
        solver=best,
        steps=steps,
        error=error,
        calls=search.calls(best, steps),
        calls_of_default=search.calls(DEFAULT_SOLVER, found[DEFAULT_SOLVER][0]) if DEFAULT_SOLVER in found else None,
        calls_of_choice=sum(search.spent),
    )


def kept(folder: Path, stage: PairsStage, teacher: LoadedTeacher) -> ChosenSolver | None:
    """The solver that was chosen before for the set in `folder`; None if there is none, or for other settings.

    InputError if its file is damaged.
    """
    try:
        found = records.load(folder / FILE, SCHEMA, "delete it, and the solver is chosen again")
    except FileNotFoundError:
        return None
    asked = {
        "teacher_digest": teacher.digest,
        "paths": stage.paths,
        "guidance_scale": stage.guidance_scale,
        "times": stage.times,
        "precision": stage.precision,
        "settings": teacher.identity_of(stage.field_settings),
        "tolerance": stage.chosen_tolerance,
    }
    return found if found.model_dump(include=set(asked)) == asked else None


def keep(folder: Path, chosen: ChosenSolver) -> None:
    """Write the choice beside the pairs, unless another process was first: all parts of a set use the same solver."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, chosen.model_dump_json(indent=1), replace=False)


@dataclass(frozen=True)
class _Search:
    velocity: VelocityField
    stage: PairsStage
    planned: Callable[[PairsStage], Manifest]
    real: Real | None
    device: torch.device
    stop: StopRequest
    spent: list[float] = field(default_factory=list)  # network calls

    @property
    def tolerance(self) -> float:
        return self.stage.chosen_tolerance

    def manifest(self, solver: str, steps: int) -> Manifest:
        return self.planned(self.stage.solved_by(solver, steps))

    def calls(self, solver: str, steps: int) -> float:
        return self.stage.solved_by(solver, steps).network_calls

    def ends(self, solver: str, steps: int) -> Tensor:
        count = min(SAMPLE, self.stage.count)
        self.spent.append(count * self.calls(solver, steps))
        return accuracy.ends(self.velocity, self.manifest(solver, steps), self.real, self.device, count, self.stop)

    def reference(self) -> Tensor:
        """The ends by so many steps that twice as many change little."""
        steps = next(n for n in steps_to_try(self.stage) if n >= STEPS)
        coarse = self.ends(REFERENCE, steps)
        for _ in range(DOUBLINGS):
            steps *= 2
            fine = self.ends(REFERENCE, steps)
            if not fine.isfinite().all():
                raise RunError("solver: auto: the first pairs contain NaN or infinity; nothing was written")
            if accuracy.difference(coarse, fine) <= self.tolerance / 10:
                return fine
            coarse = fine
        raise RunError(
            f"solver: auto cannot measure errors of {self.tolerance:g}: the first pairs still change by more than a "
            f"tenth of that from {steps // 2} to {steps} steps of {REFERENCE}; nothing was written. Increase the "
            "tolerance, or name a solver and its steps"
        )

    def least(self, solver: str, exact: Tensor) -> tuple[int, float] | None:
        """The smallest number of steps within the tolerance, and its error; None if there is none."""
        ladder, low, high = steps_to_try(self.stage), 0, len(steps_to_try(self.stage))
        errors: dict[int, float] = {}
        while low < high:
            middle = (low + high) // 2
            errors[middle] = accuracy.difference(self.ends(solver, ladder[middle]), exact)
            if errors[middle] <= self.tolerance:
                high = middle
            else:
                low = middle + 1
        return (ladder[low], errors[low]) if low < len(ladder) else None
