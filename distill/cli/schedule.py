"""`distill schedule`: finds the best step times. Also the options --schedule and --times."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.common import JsonOption, StoreOption, TeacherHelp, check_out, near, print_json, store_path
from distill.core.collection import importing
from distill.core.errors import InputError
from distill.core.field_types import MAX_SAMPLES, MAX_STEPS
from distill.core.printing import say
from distill.core.text import suggest
from distill.spec import kinds
from distill.spec.guidancespec import FieldSettings
from distill.spec.model import FINE, SAMPLES, SEED
from distill.spec.pairspec import MAX_FITTED_STEPS

if TYPE_CHECKING:
    import torch

    import distill.teachers

MAX_FINE = 10_000  # the number of costs is quadratic: one for each pair of times of the grid


def schedule(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help=TeacherHelp)],
    steps: Annotated[int, typer.Option("--steps", help="Number of steps to find times for.", min=1, max=MAX_STEPS)],
    criterion: Annotated[
        str | None,
        typer.Option(
            help="What is minimized: error, the squared errors of the solver's steps; or ays (Align Your Steps), which "
            "does not depend on a solver; by default error."
        ),
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help=f"Solver of these steps: {kinds.either(kinds.ode_solvers())}; by default euler.")
    ] = None,
    fine: Annotated[
        int | None,
        typer.Option(
            help=f"Steps of the fine grid from which times are chosen; by default {FINE}.", min=1, max=MAX_FINE
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help=f"Number of paths; by default {SAMPLES}; with --fit, 20 for each fitted number.",
            min=1,
            max=MAX_SAMPLES,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help=f"Seed of the noise of these paths; by default {SEED}.", min=0, max=2**63 - 1)
    ] = None,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 = none.", min=0, max=10_000)] = 1.0,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit times and weights of a solver (BNS) to the network, instead of times.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="With --fit: also write a student, the teacher's network with this solver.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Find the step times that minimize a criterion, or fit a whole solver, and save them in the store."""
    from distill.cli import arguments

    if out is not None and not fit:
        raise InputError("--out: has no effect without --fit; leave it out")
    if fit and not (solver is None and fine is None and criterion is None):
        raise InputError(
            "--solver, --fine and --criterion have no effect with --fit, which fits a solver of its own; leave them out"
        )
    if not fit and steps > (fine or FINE):
        raise InputError(
            f"--steps {steps} is more than --fine {fine or FINE}, the steps of the grid from which times are chosen; "
            "use fewer steps, or a larger --fine"
        )
    runs = store_path(store)
    where = arguments.teacher(teacher, runs)
    with importing():
        from distill import teachers

    place = arguments.device(device)
    loaded = teachers.load_teacher(where, place)
    if fit:
        _fit(loaded, steps, samples, seed, guidance_scale, out, place, runs, json)
        return
    from distill.students import step_times

    criterion, solver, fine, samples = criterion or "error", solver or "euler", fine or FINE, samples or SAMPLES
    seed = SEED if seed is None else seed
    costs = step_times.find(
        loaded, runs, device=place, criterion=criterion, solver=solver, fine=fine, samples=samples, seed=seed,
        settings=FieldSettings(guidance_scale),
    )  # fmt: skip
    best, uniform, errors = costs.best(steps), costs.uniform(steps), criterion == "error"
    if json:
        print_json(
            {
                "teacher_digest": loaded.digest, "criterion": criterion, "solver": solver if errors else None,
                "steps": steps, "fine": fine, "samples": samples, "seed": seed, "guidance_scale": guidance_scale,
                "times": best.times, "cost": best.cost, "uniform_cost": uniform.cost,
            }
        )  # fmt: skip
        return
    plural, name, measured, summed = "s" if steps > 1 else "", solver, "errors", "squared errors"
    if not errors:
        name, measured, summed = criterion, "AYS costs", "AYS costs"
    say(
        f"{name}, {steps} step{plural} of {loaded.description}, chosen from a grid of {fine} with {measured} measured "
        f"on {samples} paths"
    )
    say(f"times: {', '.join(f'{t:.4g}' for t in best.times)}")
    say(f"sum of {summed}: {best.cost:.4g}; with uniform steps: {uniform.cost:.4g}")


def _fit(
    teacher: "distill.teachers.LoadedTeacher",
    steps: int,
    samples: int | None,
    seed: int | None,
    guidance_scale: float,
    out: Path | None,
    device: "torch.device",
    store: Path,
    json: bool,
) -> None:
    """`distill schedule --fit`: fit a solver, or take it from the store, and write the student to `out`."""
    from distill.students import exporting, fitted, fitting

    if steps > MAX_FITTED_STEPS:
        raise InputError(f"--steps {steps}: a solver can be fitted for 1 to {MAX_FITTED_STEPS} steps")
    if out is not None:
        check_out(out)
        fitted.refuse_student(teacher, guidance_scale)
    found = fitting.find(
        teacher, store, steps, device=device, samples=samples, seed=seed, guidance_scale=guidance_scale
    )
    if out is not None:
        made, card = fitted.student(teacher, found, out.name)
        exporting.export(made, out, card, teacher.packaging)
    if json:
        print_json(found.model_dump(mode="json"))
        return
    say(f"solver of {steps} step{'s' if steps > 1 else ''}, fitted to {teacher.description} on {found.samples:,} paths")
    say(f"times: {', '.join(f'{t:.4g}' for t in found.times)}")
    before = f"{found.rms_before:.4g} with ab2"
    say(f"RMS error of the samples from other noises: {found.rms:.4g}; {before}")
    if out is not None:
        say(f"wrote {near(out.absolute())}: a student with this solver")


def refuse_schedule(schedule: str, times: str | None, valid: Sequence[str] = ("uniform", "optimal")) -> None:
    """Raise InputError for invalid values of --schedule and --times."""
    if schedule not in valid:
        raise InputError(f"--schedule {schedule}: {suggest(schedule, list(valid))}")
    if schedule != "uniform" and times is not None:
        raise InputError(f"--schedule {schedule} and --times both set the times; leave one out")


def schedule_along(
    schedule: str, times: Sequence[float] | None, steps: int, store: Path, device: "torch.device"
) -> "Callable[[distill.students.loaded.LoadedStudent], Sequence[float]] | None":
    """A function that returns the step times for a student; None for its default times.

    times: the value of --times. store: where optimal times are stored.
    """
    from distill.students import sampling, step_times

    def find(student: "distill.students.loaded.LoadedStudent") -> Sequence[float]:
        sampling.refuse_other_times(student, "--schedule" if times is None else "--times")
        return step_times.optimal_times(student, store, steps, device) if times is None else times

    return None if schedule in ("uniform", kinds.FITTED) and times is None else find


def fitted_solver(
    student: "distill.students.loaded.LoadedStudent", steps: int, store: Path
) -> "distill.students.fitted.FittedSolver":
    """The solver that was fitted to a student. InputError if the store has none."""
    from distill.students import fitted, sampling

    sampling.refuse_other_times(student, f"--schedule {kinds.FITTED}")
    found = fitted.load(store, student.digest, steps)
    if found is None:
        raise InputError(
            f"--schedule {kinds.FITTED}: no solver of {steps} step{'s' if steps > 1 else ''} was fitted to this "
            f"student yet; use: distill schedule STUDENT --steps {steps} --fit"
        )
    return found
