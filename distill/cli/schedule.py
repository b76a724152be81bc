"""`distill schedule`: finds the step times with the smallest error. Also the options --schedule and --times."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.common import JsonOption, StoreOption, TeacherHelp, print_json, store_path
from distill.core.collection import importing
from distill.core.errors import InputError
from distill.core.field_types import MAX_SAMPLES, MAX_STEPS
from distill.core.printing import say
from distill.core.text import suggest
from distill.spec import kinds
from distill.spec.model import FINE, SAMPLES, SEED

if TYPE_CHECKING:
    import torch

    from distill.students.loaded import LoadedStudent

MAX_FINE = 10_000  # the number of costs is quadratic: one for each pair of times of the grid


def schedule(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help=TeacherHelp)],
    steps: Annotated[int, typer.Option("--steps", help="Number of steps to find times for.", min=1, max=MAX_STEPS)],
    solver: Annotated[str, typer.Option(help=f"Solver of these steps: {kinds.either(kinds.ode_solvers())}.")] = "euler",
    fine: Annotated[
        int, typer.Option(help="Number of steps of the fine grid from which the times are chosen.", min=1, max=MAX_FINE)
    ] = FINE,
    samples: Annotated[
        int, typer.Option(help="Number of paths to measure errors on.", min=1, max=MAX_SAMPLES)
    ] = SAMPLES,
    seed: Annotated[int, typer.Option(help="Seed of the noise of these paths.", min=0, max=2**63 - 1)] = SEED,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 = none.", min=0, max=10_000)] = 1.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Find the step times that minimize the error of a solver, by dynamic programming, and save them in the store."""
    from distill.cli import arguments

    if steps > fine:
        raise InputError(
            f"--steps {steps} is more than --fine {fine}, the steps of the grid from which times are chosen; use fewer "
            "steps, or a larger --fine"
        )
    runs = store_path(store)
    where = arguments.teacher(teacher, runs)
    with importing():
        from distill import teachers
        from distill.students import step_times

    place = arguments.device(device)
    loaded = teachers.load_teacher(where, place)
    costs = step_times.find(
        loaded, runs, device=place, solver=solver, fine=fine, samples=samples, seed=seed, guidance_scale=guidance_scale
    )
    best, uniform = costs.best(steps), costs.uniform(steps)
    if json:
        print_json(
            {
                "teacher_digest": loaded.digest, "solver": solver, "steps": steps, "fine": fine, "samples": samples,
                "seed": seed, "guidance_scale": guidance_scale, "times": best.times, "cost": best.cost,
                "uniform_cost": uniform.cost,
            }
        )  # fmt: skip
        return
    plural = "s" if steps > 1 else ""
    say(
        f"{solver}, {steps} step{plural} of {loaded.description}, chosen from a grid of {fine} with errors measured on "
        f"{samples} paths"
    )
    say(f"times: {', '.join(f'{t:.4g}' for t in best.times)}")
    say(f"sum of squared errors: {best.cost:.4g}; with uniform steps: {uniform.cost:.4g}")


def refuse_schedule(schedule: str, times: str | None) -> None:
    """Raise InputError for invalid values of --schedule and --times."""
    if schedule not in ("uniform", "optimal"):
        raise InputError(f"--schedule {schedule}: {suggest(schedule, ['uniform', 'optimal'])}")
    if schedule == "optimal" and times is not None:
        raise InputError("--schedule optimal and --times both set the times; leave one out")


def schedule_along(
    schedule: str, times: Sequence[float] | None, steps: int, store: Path, device: "torch.device"
) -> "Callable[[LoadedStudent], Sequence[float]] | None":
    """A function that returns the step times for a student; None for its default times.

    times: the value of --times. store: where optimal times are stored.
    """
    from distill.students import sampling, step_times

    def find(student: "LoadedStudent") -> Sequence[float]:
        sampling.refuse_other_times(student, "--schedule" if times is None else "--times")
        return step_times.optimal_times(student, store, steps, device) if times is None else times

    return None if schedule == "uniform" and times is None else find
