"""`distill quickstart`, `run` and `plan`: run a spec, or show what it would do."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.cli import gpu_plan, start
from distill.cli.common import JsonOption, StoreOption, near, print_json, print_table, store_path
from distill.cli.runs import print_results
from distill.core.atomic import write_json
from distill.core.errors import EXIT_INPUT, InputError, RunError
from distill.core.printing import say, warn
from distill.core.records import read_json
from distill.core.space import human
from distill.runs.run_store import RunPaths
from distill.trackers import find_tracker

if TYPE_CHECKING:
    import distill.core.stop
    import distill.spec.model
    import distill.spec.specfile

SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="A YAML file, or the name of a preset.")]
Changes = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Changes of the spec, e.g. stages.teach.images=64000")
]
PRESET, FIRST_NAME = "digits", "quickstart"


def quickstart(store: StoreOption = None) -> None:
    """From handwritten digits to a one-step student with a report, in a few minutes on a CPU."""
    from distill.spec import presets, specfile

    folder = store_path(store)
    paths, unfinished = choose_quickstart(folder)
    if unfinished is not None:
        say(f"resuming {near(paths.root)}")
        execute(paths, unfinished)
    else:
        source = specfile.load(presets.find(PRESET), name=paths.name)
        execute(start.begin(folder, source), source.spec, fresh=True)


def choose_quickstart(folder: Path) -> tuple[RunPaths, "distill.spec.model.RunSpec | None"]:
    """(run, spec) of a quickstart to resume, or (run, None) with the first free name: quickstart, quickstart-2, ..."""
    from distill.runs import claims, todo
    from distill.spec import presets, specfile

    digest = specfile.load(presets.find(PRESET)).spec.digest()
    for number in itertools.count(1):
        paths = RunPaths(folder.absolute() / (FIRST_NAME if number == 1 else f"{FIRST_NAME}-{number}"))
        if not paths.root.exists():
            return paths, None
        try:
            if not paths.spec.exists() or claims.executing(paths):
                continue
            spec = todo.load_spec(paths)
            if spec.digest() == digest and todo.pending(paths, spec):
                return paths, spec
        except (InputError, RunError, OSError) as error:
            warn(f"run '{paths.name}' is damaged and skipped: {error}")
    raise AssertionError


def run(
    spec: SpecArgument,
    changes: Changes = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; by default the spec's.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume an existing run. SPEC can be the run's name or folder, or the spec it was started from.",
        ),
    ] = False,
    procs: Annotated[
        int | None,
        typer.Option("--procs", min=1, max=4096, help="Number of processes to train with; sets launch.procs."),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(
            "--track",
            metavar="TRACKER",
            help="Also show the run in tensorboard, wandb or an installed tracker while it runs (see `distill track`); "
            "may be given several times.",
        ),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Run a spec: train, generate pairs, export, evaluate. Completed stages are never repeated."""
    folder = store_path(store)
    changes = [*(changes or []), *([] if procs is None else [f"launch.procs={procs}"])]
    trackers = list(dict.fromkeys(track or []))
    for each in trackers:  # a name that is wrong is refused before the run is created
        find_tracker(each)
    if resume:
        execute(*start.resume(*start.find_again(folder, spec, changes, name)), trackers=trackers)
    else:
        source = start.find(spec, changes, name)
        execute(start.begin(folder, source), source.spec, fresh=True, trackers=trackers)


def plan(
    spec: SpecArgument,
    changes: Changes = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also run two steps of each training and measure its memory.")
    ] = False,
    gpus: gpu_plan.GpusToPlan = None,
    nodes: gpu_plan.NodesToPlan = None,
    model: gpu_plan.ModelOption = None,
    utilisation: gpu_plan.UtilisationOption = None,
    step_time: gpu_plan.MeasuredOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Check a spec and print everything that its run would do; creates no run.

    With --gpus it prints instead what its trainings need of such GPUs, how long they take there, and the section launch
    for them, without a GPU. A store that exists keeps the index of the data, so that the run need not read all files
    again.
    """
    from distill.plans import planning

    options = gpu_plan.GpuOptions(gpus, nodes, model, utilisation, step_time)
    options.refuse_without_gpus()
    if gpus is not None and measure:
        raise InputError("--gpus and --measure: the first needs no GPU, the second runs on this machine; leave one out")
    folder = store_path(store)
    source = start.find(spec, changes or [], None)
    if gpus is not None:
        gpu_plan.show(source, options, folder, json=json)
        return
    ready = start.checked(source, here=source.spec.launch.nodes == 1 or measure, store=folder)
    resolved, found = ready.resolved, ready.data
    source, steps = replace(source, spec=resolved.spec), planning.steps(resolved)
    paths = RunPaths(folder.absolute() / source.spec.name)
    memory = _measured(source, folder) if measure else {}
    if json:
        measured = {"memory": memory} if measure else {}
        known = {"data": None if found is None else asdict(found)}
        known["students"] = {name: asdict(each.smaller) for name, each in ready.built.items() if each.smaller}
        print_json({**planning.as_json(source.spec, paths, steps), **known, **measured})
        return
    exists = "  (a run with this name already exists; use --name OTHER for a new one, or --resume)"
    taken = exists if paths.root.exists() else ""
    say(f"run {source.spec.name}, seed {source.spec.seed}, spec {source.spec.digest()[:12]}\n")
    print_table(
        ["stage", "kind", "what", "work", "needs", "writes"],
        [[s.name, s.kind, s.what, s.work, ", ".join(s.needs), "\n".join(s.writes)] for s in steps],
    )
    start.say_stream(source.spec)
    if found is not None:
        say("\n".join(found.lines()))
    for name, each in ready.built.items():
        if each.smaller is not None:
            say(f"student of '{name}': {each.smaller.words}")
    say(f"writes to {near(paths.root)}{taken}")
    say(f"checked: {'; '.join(planning.CHECKS)}")
    if measure:
        columns = ["memory per process", "", "predicted", "measured: min", "max"]
        rows = [
            [stage, what, "-" if expected is None else human(expected), human(min(found)), human(max(found))]
            for stage, what, expected, found in planning.memory_rows(memory)
        ]
        print_table(columns, rows, right=columns[2:])


def _measured(source: "distill.spec.specfile.SpecSource", store: Path) -> dict[str, list[dict[str, Any]]]:
    """Stage -> memory use of each rank in training, measured in a temporary run of two steps."""
    from distill.plans import planning
    from distill.spec.model import TrainStage

    with rehearsed(replace(source, spec=planning.miniature(source.spec)), store) as run:
        return {
            name: [read_json(run.stage(name).memory(rank)) for rank in range(source.spec.launch.procs)]
            for name, each in source.spec.stages.items()
            if isinstance(each, TrainStage)
        }


@contextmanager
def rehearsed(source: "distill.spec.specfile.SpecSource", store: Path) -> Iterator[RunPaths]:
    """Context manager: execute a spec without its evaluations in a temporary run with measurements, and yield the run.

    It is deleted at the end. store: has the caches of the spec. InputError if they are not made yet.
    """
    from distill.launch import local
    from distill.spec.model import EvaluateStage

    with tempfile.TemporaryDirectory(prefix="distill-") as folder:
        run = start.begin(Path(folder), source)
        if source.spec.cache is not None:
            _use_caches(run, source, store.absolute())
        done = [name for name in source.spec.stages if run.stage(name).done.exists()]
        names = [
            name
            for name, each in source.spec.stages.items()
            if not isinstance(each, EvaluateStage) and name not in done
        ]
        code = local.run_stages(run, names, measure=True)
        if code:
            raise typer.Exit(code)
        yield run


def _use_caches(run: RunPaths, source: "distill.spec.specfile.SpecSource", store: Path) -> None:
    """Let a temporary run use the caches of a store. InputError if they are not made yet."""
    from distill.execution.caching import Caching
    from distill.runs import cached
    from distill.spec import checks

    made = Caching.of(checks.check(source.spec, source.base), store, store)
    for each in made.planned:
        if not made.is_complete(each):
            raise InputError(
                f"measurements need the {each.what} of the cache stage '{made.name}', which are not complete in "
                f"{near(made.place(each))}; make them first with: distill cache {source.source}"
            )
    (run.root.parent / cached.FOLDER).symlink_to(store / cached.FOLDER)
    run.stage(made.name).root.mkdir(parents=True)
    write_json(run.stage(made.name).done, cached.as_json([made.finished(each) for each in made.planned]))


def execute(
    paths: RunPaths, spec: "distill.spec.model.RunSpec", *, fresh: bool = False, trackers: Sequence[str] = ()
) -> None:
    """Run the unfinished stages of a run, and print the results. Raises typer.Exit if a process fails.

    fresh: the run has just been created. It is deleted if its process refuses the input before any work.
    trackers: follow the run meanwhile.
    """
    from distill.launch import beside, local
    from distill.runs import todo

    pending = todo.pending(paths, spec)
    for name in todo.lost_pairs(paths, spec):
        say(f"the pairs of stage '{name}' are missing or damaged, and still needed: they are made again")
        paths.stage(name).done.unlink()
    if pending:
        say(f"run '{paths.name}' in {near(paths.root)}: {', '.join(pending)}", flush=True)
        with beside.tracked(paths, trackers):
            code = local.run_stages(paths, pending)
        if code == EXIT_INPUT and fresh and not any(path.is_file() for path in paths.root.glob("stages/**/*")):
            shutil.rmtree(paths.root)
        if code:
            raise typer.Exit(code)
    else:
        say(f"all stages of run '{paths.name}' are done")
    _farewell(paths)


def _farewell(paths: RunPaths) -> None:
    """Print the tables of results and the paths of the output."""
    print_results(paths)
    rows = [("run", paths.root), *((f"student {p.name}", p) for p in sorted(paths.students.glob("*")) if p.is_dir())]
    files = {"comparison": paths.comparison_table, "comparison figure": paths.comparison_figure, "report": paths.report}
    rows += [(label, path) for label, path in files.items() if path.exists()]
    for label, path in rows:
        say(f"{label:<20} {near(path)}")
