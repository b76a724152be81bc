"""`distill list`, `show` and `clean`: what lies in the store. No torch, nothing computed."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.cli.common import JsonOption, StoreOption, near, print_json, print_table, size, store_path
from distill.guard import InputError
from distill.printing import say, say_table
from distill.space import human
from distill.store import RunPaths

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run in the store, or its folder.")]


def list_runs(store: StoreOption = None, json: JsonOption = False) -> None:
    """List the runs of the store with their state and progress."""
    from distill import status
    from distill import store as stores

    folder = store_path(store)
    found = [status.read(run) for run in stores.runs(folder)]
    if json:
        print_json([asdict(each) for each in found])
        return
    if not found:
        say(f"no runs in {near(folder.absolute())}; make the first: distill run digits")
        return
    rows = []
    for each in found:
        done = sum(stage.state == "done" for stage in each.stages)
        current = next((stage for stage in each.stages if stage.state == "begun"), None)
        at = "" if current is None else f"{current.name} {_percent(current)}".strip()
        rows.append([each.name, each.state, f"{done}/{len(each.stages)}", at, status.age(each.changed)])
    print_table(["run", "state", "stages", "at", "last event"], rows)


def show(run: RunArgument, store: StoreOption = None, json: JsonOption = False) -> None:
    """Show a run: its spec in short, its stages, losses, students, and where the files lie."""
    from distill import status
    from distill import store as stores

    paths = stores.find_run(store_path(store), run)
    each, students = status.read(paths), status.students(paths)
    evaluations = sorted(paths.root.glob("stages/*/results.json"))
    if json:
        found = {path.parent.name: stores.read_json(path) for path in evaluations}
        print_json(asdict(each) | {"students": students, "results": found, "spec": str(paths.spec)})
        return
    say(f"{each.name}  {each.state}{f': {each.message}' if each.message else ''}  {status.age(each.changed)}")
    for line in _summary(_plain_spec(paths.spec)):
        say(f"  {line}")
    rows = []
    for stage in each.stages:
        losses = "  ".join(f"{name} {value:.4g}" for name, value in stage.logs.items())
        rows.append([stage.name, stage.kind, stage.state, _percent(stage), _count(stage), losses])
    print_table(["stage", "kind", "state", "", "progress", "last losses"], rows)
    for name, card in students.items():
        metrics = "  ".join(f"{key} {value:.4g}" for key, value in card.get("metrics", {}).items())
        say(f"student {name}: {near(paths.student(name))}  {metrics}")
    if evaluations:
        print_results(paths)
    say(f"spec    {near(paths.spec)}\nevents  {near(paths.events)}")
    if paths.report.exists():
        say(f"report  {near(paths.report)}")
    if each.state != "done" and each.state != "running":
        say(f"go on with: distill run {near(paths.root)} --resume")


def print_results(run: RunPaths) -> None:
    """The table of each evaluation that a run has, of its rounds of reflow, and of the recipes that it compares."""
    from distill import compared, results, straightened

    evaluations = results.of_run(run)
    for found in evaluations.values():
        say_table(results.table(found))
    rounds = straightened.rounds(evaluations)
    if rounds:
        say_table(straightened.table(rounds))
    for each in rounds:
        if each.warning is not None:
            say(f"warning: {each.warning}")
    comparison = compared.found(run)
    if comparison is not None:
        say_table(compared.table(comparison))


def clean(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Name of a run in the store, or its folder.")
    ] = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Checkpoints of stages that are done.")] = False,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Pairs; where a stage still needs them, they are made again.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="The whole run, students included.")] = False,
    inputs: Annotated[
        bool, typer.Option("--inputs", help="What was fetched for runs that are no more; no RUN.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do it.")] = False,
    store: StoreOption = None,
) -> None:
    """Say what a run no longer needs, and how much that would free; with --yes, delete it."""
    from distill import claims
    from distill import store as stores

    if inputs:
        if run is not None or checkpoints or pairs or everything:
            raise InputError("--inputs looks at the whole store; leave RUN and the other options out")
        _clean_inputs(store_path(store), yes)
        return
    if run is None:
        raise InputError("name a run, or give --inputs; `distill list` lists the runs")
    paths = stores.find_run(store_path(store), run)
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
            say(f"stage '{name}' would be to do again: a stage that is not done needs its pairs")
        options = "--yes" if chosen else "--checkpoints, --pairs or --all, and --yes"
        say(f"{human(sum(sizes.values()))} would be free; nothing was deleted: add {options}")
        return
    _refuse_if_queued(paths)
    with claims.claim(paths):
        for name in wanted:  # first, so that whatever happens no stage counts as done without its pairs
            paths.stage(name).done.unlink()
            say(f"stage '{name}' is to do again: a stage that is not done needs its pairs")
        for path in found:
            if path != paths.root:
                shutil.rmtree(path)
    if everything:
        shutil.rmtree(paths.root)
    folders = f"{len(found)} folder{'s' if len(found) > 1 else ''}"
    say(f"deleted {folders}, {human(sum(sizes.values()))}")


def _clean_inputs(folder: Path, yes: bool) -> None:
    from distill import inputs

    sizes = {path: size(path) for path in inputs.unused(folder)}
    for path, count in sizes.items():
        say(f"{human(count):>10}  {near(path)}")
    total = human(sum(sizes.values()))
    if not sizes:
        say(f"nothing to delete in {near(folder.absolute() / 'inputs')}: runs need it, or it was asked for lately")
    elif not yes:
        say(f"{total} would be free; nothing was deleted: add --yes")
    else:
        for path in sizes:
            shutil.rmtree(path)
        say(f"deleted {len(sizes)} folder{'s' if len(sizes) > 1 else ''}, {total}")


def _refuse_if_queued(paths: RunPaths) -> None:
    """InputError while jobs of the run wait in a queue: they need what is there. Where there is no Slurm, none do."""
    from distill.launch import slurm
    from distill.launch import submit as queue

    if not paths.jobs.is_dir():
        return
    try:
        live = queue.live_jobs(paths)
    except slurm.NoAnswer as error:
        say(f"warning: {error}; so it is not known whether jobs of this run wait in a queue")
        return
    if live:
        names = ", ".join(job.id for job in live)
        raise InputError(
            f"jobs of run '{paths.name}' are under way ({names}); wait for them, or: distill cancel {paths.name}"
        )


def _wanted_pairs(run: RunPaths) -> list[str]:
    """The pairs stages that are done, and that a stage still to do trains on."""
    from distill import specfile, workflow

    return sorted(name for name in workflow.wanted_pairs(run, specfile.load_run(run)) if run.stage(name).done.exists())


def _waste(root: Path, checkpoints: bool, pairs: bool) -> list[Path]:
    """Folders that may go: checkpoints of done stages, pairs, claims of processes that were killed."""
    found = [*root.glob(".dead-*"), *root.glob(".running-*")]  # the second of a kill while it claimed the run
    for stage in sorted((root / "stages").glob("*")):
        if checkpoints and (stage / "done.json").exists() and (stage / "checkpoints").is_dir():
            found.append(stage / "checkpoints")
        if pairs and (stage / "pairs").is_dir():
            found.append(stage / "pairs")
    return found


def _percent(stage: Any) -> str:  # noqa: ANN401  (a StageStatus; its module is imported late)
    if stage.state == "done":
        return "100%"
    return f"{100 * stage.done / stage.total:.0f}%" if stage.done is not None and stage.total else ""


def _count(stage: Any) -> str:  # noqa: ANN401
    return f"{stage.done:,}/{stage.total:,} {stage.unit}" if stage.done is not None and stage.total else ""


def _plain_spec(path: Path) -> dict[str, Any]:
    from distill import yamltext

    content = yamltext.parse(yamltext.read(path), str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: not the spec of a run")
    return content


def _summary(spec: dict[str, Any]) -> list[str]:
    """A spec in a few lines."""
    teacher, data = spec.get("teacher"), spec.get("data") or {}
    lines = [f"seed {spec.get('seed')}, data {data.get('kind')}"]
    if teacher:
        lines[0] += f", teacher {teacher.get('path') or teacher.get('kind')}"
    for name, stage in spec.get("stages", {}).items():
        if stage["kind"] == "train":
            lines.append(f"{name}: {stage['recipe']}, {stage['images']:,} images, batch {stage['batch_size']}")
        elif stage["kind"] == "pairs":
            lines.append(f"{name}: {stage['count']:,} pairs, {stage['solver']} {stage['steps']} steps")
        else:
            lines.append(f"{name}: {stage['samples']:,} samples of {', '.join(['teacher', *stage['students']])}")
    return lines
