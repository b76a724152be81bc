"""`distill compare`: trains several recipes on the same teacher, data and minutes, and compares them."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli import start, work
from distill.cli.common import StoreOption, near, one_line, print_table, store_path
from distill.cli.work import Changes, SpecArgument
from distill.core.errors import InputError
from distill.core.printing import say
from distill.core.space import human
from distill.runs.progress import duration
from distill.runs.run_store import RunPaths

if TYPE_CHECKING:
    import distill.plans.comparison
    import distill.reports.comparison_table
    import distill.spec.specfile


def compare(
    spec: SpecArgument,
    changes: Changes = None,
    recipes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Recipes to compare, like reflow,slimflow; by default every distillation recipe in SPEC.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--budget", metavar="MINUTES", help="Minutes of training for each recipe, on this machine."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; by default the spec's.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume an existing run. SPEC can be the run's name or folder, or the spec it was started from.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure the speed and print the plan of each recipe; create no run.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Train several recipes with the same teacher, data and time; write one table and one figure.

    SPEC defines the teacher, the pairs and the evaluation. A recipe that SPEC uses keeps its stages, with a length that
    fits the budget; any other recipe gets one stage with default options. Speed is measured first, in a short run.
    """
    from distill.plans import budget

    if dry_run and resume:
        raise InputError("--dry-run describes a new run and cannot be combined with --resume; remove --resume")
    if minutes is not None:
        budget.check(minutes)
    asked = None if recipes is None else [each.strip() for each in recipes.split(",")]
    folder = store_path(store)
    if resume:
        work.execute(*_again(folder, spec, changes or [], name, asked, minutes))
        return
    if minutes is None:
        raise InputError("--budget is missing; give the minutes of training for each recipe, e.g. --budget 2")
    source = start.find(spec, changes or [], name)
    planned = _planned(source, asked)
    if not dry_run:
        start.refuse_taken(folder, source)
    say(f"measuring {budget.BATCHES} steps of each training, in a temporary run", flush=True)
    with work.rehearsed(replace(source, spec=budget.rehearsal(planned)), folder) as run:
        measured = budget.measured(planned, run)
    command = one_line(f"distill {shlex.join(sys.argv[1:])}")
    found, record = budget.frozen(planned, measured, minutes, command)
    source = replace(source, spec=start.checked(replace(source, spec=found)).resolved.spec)
    _say(record)
    if dry_run:
        taken = RunPaths(folder.absolute() / found.name).root
        exists = (
            "; a run with this name already exists; use --name OTHER for a new one, or --resume"
            if taken.exists()
            else ""
        )
        say(f"nothing was written{exists}")
        return
    run = start.create(folder, source, {"comparison.json": record.model_dump_json(indent=2) + "\n"})
    work.execute(run, source.spec, fresh=True)


def _planned(
    source: "distill.spec.specfile.SpecSource", asked: Sequence[str] | None
) -> "distill.plans.comparison.ComparisonPlan":
    from distill.plans import comparison
    from distill.spec import checks

    planned = comparison.plan(checks.check(source.spec, source.base), asked)
    checks.check(planned.spec(), source.base)
    return planned


def _again(
    folder: Path, given: str, changes: list[str], name: str | None, asked: Sequence[str] | None, minutes: float | None
) -> "tuple[RunPaths, distill.spec.model.RunSpec]":
    """The run and spec of a comparison to resume. InputError if the given options do not agree with it."""
    from distill.plans import budget
    from distill.reports import comparison_table

    shaping = [option for option, value in {"--recipes": asked, "--budget": minutes}.items() if value is not None]
    if start.is_run(folder, given) and shaping and not start.is_spec(given):
        raise InputError(f"{shaping[0]} has no effect when run '{given}' is resumed; leave it out")
    if start.is_run(folder, given) and not shaping:
        run, source = start.find_again(folder, given, changes, name)
        _record(run, comparison_table.load(run))
        return start.resume(run, source)
    source = start.find(given, changes, name)
    run, source = start.again(folder, source)
    record = _record(run, comparison_table.load(run))
    if minutes is not None and minutes != record.budget_minutes:
        raise InputError(
            f"--budget {minutes:g}: run '{run.name}' was started with {record.budget_minutes:g} minutes for each "
            "recipe; leave the option out, or start another run with --name OTHER"
        )
    planned = _planned(source, asked)
    chosen, begun = ([each.name for each in entries] for entries in (planned.chains, record.entries))
    if chosen != begun:
        raise InputError(
            f"run '{run.name}' compares {', '.join(begun)}, not {', '.join(chosen)}; name the same recipes, or start "
            "another run with --name OTHER"
        )
    for chain, entry in zip(planned.chains, record.entries, strict=True):
        ours, theirs = list(chain.trained), [part.stage for part in entry.parts]
        if ours != theirs:
            raise InputError(
                f"run '{run.name}' cannot be resumed with a changed spec: the stages of "
                f"'{chain.name}' are {', '.join(theirs)} in the run, but {', '.join(ours)} in the spec; undo the "
                "change, or start another run with --name OTHER"
            )
    found, _ = budget.frozen(planned, record.measured, record.budget_minutes, record.command)
    return start.resume(run, replace(source, spec=found))


def _record(
    run: RunPaths, found: "distill.reports.comparison_table.Comparison | None"
) -> "distill.reports.comparison_table.Comparison":
    if found is None:
        raise InputError(f"run '{run.name}' is not a comparison; resume it with: distill run {near(run.root)} --resume")
    return found


def _say(record: "distill.reports.comparison_table.Comparison") -> None:
    """Print the expected cost of each recipe, before the run starts."""
    from distill.reports import comparison_table

    rows = []
    for entry in record.entries:
        for part in entry.parts:
            rows.append(
                [
                    comparison_table.titled(entry),
                    part.stage,
                    f"{1 / part.measured.seconds_per_image:,.0f}",
                    f"{part.images:,}",
                    f"about {duration(part.seconds)}",
                    human(part.measured.memory),
                    f"{part.measured.teacher_calls:.3g}",
                ]
            )
    columns = ["recipe", "stage", "images/s", "images", "training", "memory", "teacher calls per image"]
    print_table(columns, rows, right=columns[2:])
