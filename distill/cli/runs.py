"""`distill list`, `show` and `clean`: list, show and clean up runs. Does not import torch."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.common import JsonOption, StoreOption, near, print_json, print_table, size, store_path
from distill.core.errors import InputError
from distill.core.printing import say, say_table
from distill.core.space import human
from distill.core.text import one_line
from distill.runs.run_store import RunPaths

if TYPE_CHECKING:
    import distill.reports.run_status
    import distill.spec.model

CELL, MESSAGE = 100, 1000  # longest cell of a table, longest message from a file, in characters
MANY = 50  # at most this many numbers of a stage or a student are printed
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run in the store, or its folder.")]


def list_runs(store: StoreOption = None, json: JsonOption = False) -> None:
    """List the runs of the store with their state and progress."""
    from distill.reports import run_status
    from distill.runs import run_store

    folder = store_path(store)
    found = run_status.read_all(run_store.runs(folder))
    if json:
        print_json([asdict(each) for each in found])
        return
    if not found:
        say(f"no runs in {near(folder.absolute())}; start one with: distill run digits")
        return
    rows = []
    for each in found:
        done = sum(stage.state == "done" for stage in each.stages)
        current = next((stage for stage in each.stages if stage.state == "begun"), None)
        at = "" if current is None else f"{current.name} {_percent(current)}".strip()
        rows.append([each.name, each.state, stages_done(done, each), at, run_status.age(each.changed)])
    print_rows(["run", "state", "stages", "at", "last event"], rows)
    warn_of_damage(found)


def stages_done(done: int, run: "distill.reports.run_status.RunStatus") -> str:
    """Text like 2/5; "" if the number of stages is unknown."""
    return f"{done}/{len(run.stages)}" if run.stages else ""


def print_rows(headers: Sequence[str], rows: Sequence[Sequence[str]], letters: int = CELL) -> None:
    """Print a table with one line per row. rich is not used, since it needs a millisecond per row.

    letters: longest cell in characters.
    """
    clean = [[one_line(cell, letters) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *clean, strict=True)]
    for row in (headers, ["\u2500" * width for width in widths], *clean):
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def warn_of_damage(runs: "Iterable[distill.reports.run_status.RunStatus]") -> None:
    """Print a warning for each run whose files cannot be read, with the reason."""
    from distill.reports import run_status

    for each in runs:
        if each.state == run_status.DAMAGED:
            say(f"warning: run '{one_line(each.name)}' is damaged: {one_line(each.message, MESSAGE)}")


def headline(name: str, state: str, message: str, changed: float | None) -> str:
    """A run in one line: name, state, message, time since the last event."""
    from distill.reports import run_status

    why = f": {one_line(message, MESSAGE)}" if message else ""
    return f"{one_line(name)}  {state}{why}  {run_status.age(changed)}"


def numbers(found: Mapping[str, float]) -> str:
    """Names and numbers as one line; at most `MANY`."""
    shown = [f"{one_line(name)} {value:.4g}" for name, value in islice(found.items(), MANY)]
    return "  ".join([*shown, "..."] if len(found) > MANY else shown)


def show(run: RunArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Show a run: a summary of its spec, its stages, losses, students, and the paths of its files."""
    from distill.reports import run_status
    from distill.runs import results, run_store, todo

    paths = run_store.find_run(store_path(store), run)
    each, students = run_status.read(paths), run_status.students(paths)
    evaluations = results.of_run(paths)
    if json:
        found = {name: content.model_dump(mode="json") for name, content in evaluations.items()}
        cards = {name: card.model_dump(mode="json") for name, card in students.items()}
        print_json(asdict(each) | {"students": cards, "results": found, "spec": str(paths.spec)})
        return
    summary = _summary(todo.load_spec(paths))
    say(headline(each.name, each.state, each.message, each.changed))
    for line in summary:
        say(f"  {line}")
    rows = []
    for stage in each.stages:
        rows.append([stage.name, stage.kind, stage.state, _percent(stage), _count(stage), numbers(stage.logs)])
    print_table(["stage", "kind", "state", "", "progress", "last losses"], rows)
    for name, card in students.items():
        say(f"student {name}: {near(paths.student(name))}  {numbers(card.metrics)}")
    if evaluations:
        print_results(paths)
    noted = paths.events if paths.events.exists() else paths.old_events
    say(f"spec    {near(paths.spec)}\nevents  {near(noted)}")
    if paths.report.exists():
        say(f"report  {near(paths.report)}")
    say_how_to_resume(paths, each.state)


def say_how_to_resume(run: RunPaths, state: str, *, in_jobs: bool = False) -> None:
    """Print the command that resumes a run, unless it is done, running or queued. in_jobs: it was run by jobs."""
    if state not in ("done", "running", "queued"):
        say(f"resume with: distill {'submit' if in_jobs else 'run'} {near(run.root)} --resume")


def print_results(run: RunPaths) -> None:
    """Print the tables of a run: of each evaluation, of its rounds of reflow, and of the recipes that it compares."""
    from distill.reports import comparison_table, rounds_table
    from distill.runs import results

    evaluations = results.of_run(run)
    for found in evaluations.values():
        say_table(results.table(found))
    rounds = rounds_table.rounds(evaluations)
    if rounds:
        say_table(rounds_table.table(rounds))
    for each in rounds:
        if each.warning is not None:
            say(f"warning: {each.warning}")
    comparison = comparison_table.found(run)
    if comparison is not None:
        say_table(comparison_table.table(comparison))


def clean(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Name of a run in the store, or its folder.")
    ] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Delete the checkpoints of stages that are done, and their snapshots.")
    ] = False,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Delete pairs; they are generated again if a stage still needs them.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Delete the whole run, with its students.")] = False,
    inputs: Annotated[
        bool,
        typer.Option(
            "--inputs", help="Delete files downloaded from the hub that no run uses any more; give it without RUN."
        ),
    ] = False,
    caches: Annotated[
        bool,
        typer.Option(
            "--caches", help="Delete cached latents and prompts that no run uses any more; give it without RUN."
        ),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Delete; by default, only list what would be deleted.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """List what a run no longer needs and how much space that would free; with --yes, delete it."""
    from distill.runs import claims, run_store

    if inputs or caches:
        if run is not None or checkpoints or pairs or everything or (inputs and caches):
            option = "--inputs" if inputs else "--caches"
            raise InputError(f"{option} applies to the whole store; leave RUN and the other options out")
        _clean_store(store_path(store), yes, "inputs" if inputs else "caches")
        return
    if run is None:
        raise InputError("name a run, or give --inputs or --caches; `distill list` lists the runs")
    paths = run_store.find_run(store_path(store), run)
    chosen = checkpoints or pairs or everything
    if yes and not chosen:
        raise InputError("say what to delete: --checkpoints, --pairs, or --all")
    claims.refuse_if_executing(paths)
    found = [paths.root] if everything else _waste(paths.root, checkpoints or not chosen, pairs or not chosen)
    wanted = _wanted_pairs(paths) if (pairs or not chosen) and not everything else []
    if not found:
        say(f"nothing to delete in {near(paths.root)}")
        return
    sizes = {path: size(path) for path in found}
    for path, count in sizes.items():
        say(f"{human(count):>10}  {near(path)}")
    if not yes:
        for name in wanted:
            say(f"stage '{name}' would have to run again, because an unfinished stage needs its pairs")
        options = "--yes" if chosen else "--checkpoints, --pairs or --all, and --yes"
        say(f"{human(sum(sizes.values()))} would be freed; nothing was deleted: add {options}")
        return
    _refuse_if_queued(paths)
    with claims.claim(paths):
        for name in wanted:  # first, so that no stage counts as done without its pairs, even after a crash
            paths.stage(name).done.unlink()
            say(f"stage '{name}' has to run again, because an unfinished stage needs its pairs")
        for path in found:
            if path.is_dir() and path != paths.root:
                shutil.rmtree(path)
            elif path != paths.root:
                path.unlink()  # an empty file left by a late renewal, see `core.lease`
    if everything:
        shutil.rmtree(paths.root)
    folders = f"{len(found)} folder{'s' if len(found) > 1 else ''}"
    say(f"deleted {folders}, {human(sum(sizes.values()))}")


def _clean_store(folder: Path, yes: bool, what: str) -> None:
    """List or delete the inputs or caches of a store that no run uses."""
    if what == "inputs":
        from distill.execution import prefetch

        unused = prefetch.unused(folder)
    else:
        from distill.runs import cached

        unused = cached.unused(folder)
    sizes = {path: size(path) for path in unused}
    for path, count in sizes.items():
        say(f"{human(count):>10}  {near(path)}")
    total = human(sum(sizes.values()))
    if not sizes:
        say(
            f"nothing to delete in {near(folder.absolute() / what)}: every {what[:-1]} is used by a run, or was "
            f"{'requested' if what == 'inputs' else 'used'} within the last day"
        )
    elif not yes:
        say(f"{total} would be freed; nothing was deleted: add --yes")
    else:
        for path in sizes:
            shutil.rmtree(path)
        say(f"deleted {len(sizes)} folder{'s' if len(sizes) > 1 else ''}, {total}")


def _refuse_if_queued(paths: RunPaths) -> None:
    """Raise InputError if jobs of the run are queued or running, since they need its files.

    If Slurm does not answer, only a warning is printed.
    """
    from distill.launch import queue, slurm

    if not paths.jobs.is_dir():
        return
    try:
        live = queue.live_jobs(paths)
    except slurm.NoAnswer as error:
        say(f"warning: {error}; jobs of this run may still be queued or running")
        return
    if live:
        names = ", ".join(job.id for job in live)
        raise InputError(
            f"jobs of run '{paths.name}' are running or queued ({names}); wait for them, "
            f"or: distill cancel {paths.name}"
        )


def _wanted_pairs(run: RunPaths) -> list[str]:
    """The completed pairs stages that an unfinished stage trains on."""
    from distill.runs import todo

    return sorted(name for name in todo.wanted_pairs(run, todo.load_spec(run)) if run.stage(name).done.exists())


def _waste(root: Path, checkpoints: bool, pairs: bool) -> list[Path]:
    """Paths that may be deleted: checkpoints of completed stages, pairs, claims of killed processes."""
    found = [*root.glob(".dead-*"), *root.glob(".running-*")]  # .running-*: of a process killed while claiming the run
    for stage in sorted((root / "stages").glob("*")):
        for name in ("checkpoints", "snapshots"):
            if checkpoints and (stage / "done.json").exists() and (stage / name).is_dir():
                found.append(stage / name)
        if pairs and (stage / "pairs").is_dir():
            found.append(stage / "pairs")
    return found


def _percent(stage: "distill.reports.run_status.StageStatus") -> str:
    if stage.state == "done":
        return "100%"
    return f"{100 * stage.done / stage.total:.0f}%" if stage.done is not None and stage.total else ""


def _count(stage: "distill.reports.run_status.StageStatus") -> str:
    return f"{stage.done:,}/{stage.total:,} {stage.unit}" if stage.done is not None and stage.total else ""


def _summary(spec: "distill.spec.model.RunSpec") -> list[str]:
    """A summary of a spec in a few lines."""
    from distill.spec import kinds
    from distill.spec.model import CacheStage, CheckpointTeacher, PairsStage, TrainStage

    lines = [f"seed {spec.seed}, data {spec.data.kind}"]
    if spec.teacher is not None:
        path = spec.teacher.path if isinstance(spec.teacher, CheckpointTeacher) else ""
        lines[0] += f", teacher {path or spec.teacher.kind}"
    for name, stage in spec.stages.items():
        if isinstance(stage, TrainStage):
            lines.append(f"{name}: {stage.recipe}, {stage.images:,} images, batch {stage.batch_size}")
        elif isinstance(stage, PairsStage):
            steps = "" if stage.solver == kinds.AUTO else f" {stage.steps} steps"
            lines.append(f"{name}: {stage.count:,} pairs, {stage.solver}{steps}")
        elif isinstance(stage, CacheStage):
            lines.append(f"{name}: images in files of {stage.shard:,}, prompts in files of {stage.prompts_shard:,}")
        else:
            lines.append(f"{name}: {stage.samples:,} samples of {', '.join(['teacher', *stage.students])}")
    return lines
