"""`distill quickstart`, `run`, `plan` and the hidden `stage`: from a spec to a run."""

import itertools
import json as jsons
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.cli.common import JsonOption, StoreOption, near, one_line, print_json, print_table, store_path
from distill.cli.runs import print_results
from distill.guard import EXIT_INPUT, InputError, Stopped, suggest
from distill.space import human
from distill.store import RunPaths, append_event, create_run, event_line, find_run, name_in_use, read_json, write_atomic

if TYPE_CHECKING:
    import distill.spec
    import distill.specfile
    import distill.stop

SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="A YAML file, or the name of a preset.")]
Changes = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Changes of the spec, e.g. stages.teach.images=64000")
]
PRESET, FIRST_NAME = "digits", "quickstart"


def quickstart(store: StoreOption = None) -> None:
    """From handwritten digits to a one-step student with a report, in a few minutes on a CPU."""
    from distill import presets, specfile

    folder = store_path(store)
    paths, unfinished = choose_quickstart(folder)
    if unfinished is not None:
        print(f"going on with {near(paths.root)}")
        _execute(paths, unfinished)
    else:
        source = specfile.load(presets.find(PRESET), name=paths.name)
        _execute(_start(folder, source), source.spec, fresh=True)


def choose_quickstart(folder: Path) -> tuple[RunPaths, "distill.spec.RunSpec | None"]:
    """The quickstart that was stopped, with its spec; or the first name that is free: quickstart, quickstart-2, ..."""
    from distill import claims, presets, specfile, workflow

    digest = specfile.load(presets.find(PRESET)).spec.digest()
    for number in itertools.count(1):
        paths = RunPaths(folder.absolute() / (FIRST_NAME if number == 1 else f"{FIRST_NAME}-{number}"))
        if not paths.root.exists():
            return paths, None
        if not paths.spec.exists() or claims.executing(paths):
            continue
        spec = specfile.load_run(paths)
        if spec.digest() == digest and workflow.pending(paths, spec):
            return paths, spec
    raise AssertionError


def run(
    spec: SpecArgument,
    changes: Changes = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; by default the spec's.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run of this name; SPEC may be the run itself.")
    ] = False,
    procs: Annotated[
        int | None, typer.Option("--procs", min=1, help="Processes that train together; short for launch.procs=N.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Execute a spec: train, solve pairs, export, evaluate. What is done is never redone."""
    folder = store_path(store)
    changes = [*(changes or []), *([] if procs is None else [f"launch.procs={procs}"])]
    if resume:
        _execute(*_resume(folder, spec, changes, name))
    else:
        source = _find(spec, changes, name)
        _execute(_start(folder, source), source.spec, fresh=True)


def plan(
    spec: SpecArgument,
    changes: Changes = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also make two steps of each training, and count the memory it takes.")
    ] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Say everything that a run would do, after all its checks; changes nothing."""
    from distill import planning

    folder = store_path(store)
    source = _checked(_find(spec, changes or [], None))
    steps = planning.steps(source.spec, source.base)
    paths = RunPaths(folder.absolute() / source.spec.name)
    memory = _measured(source) if measure else {}
    if json:
        measured = {"memory": memory} if measure else {}
        print_json({**planning.as_json(source.spec, paths, steps), **measured})
        return
    taken = "  (a run of this name exists: --name or --resume)" if paths.root.exists() else ""
    print(f"run {source.spec.name}, seed {source.spec.seed}, spec {source.spec.digest()[:12]}\n")
    print_table(
        ["stage", "kind", "what", "work", "needs", "writes"],
        [[s.name, s.kind, s.what, s.work, ", ".join(s.needs), "\n".join(s.writes)] for s in steps],
    )
    print(f"writes into {near(paths.root)}{taken}")
    print(f"checked: {'; '.join(planning.CHECKS)}")
    if measure:
        columns = ["memory of a process", "", "predicted", "counted, least", "most"]
        rows = [
            [stage, what, "-" if expected is None else human(expected), human(min(found)), human(max(found))]
            for stage, what, expected, found in planning.memory_rows(memory)
        ]
        print_table(columns, rows, right=columns[2:])


def _measured(source: "distill.specfile.SpecSource") -> dict[str, list[dict[str, Any]]]:
    """What training takes of memory, by stage and rank, from a run of two steps that is thrown away."""
    from distill import planning
    from distill.launch import local
    from distill.spec import EvaluateStage, TrainStage

    with tempfile.TemporaryDirectory(prefix="distill-") as folder:
        run = _start(Path(folder), replace(source, spec=planning.miniature(source.spec)))
        stages = source.spec.stages.items()
        names = [name for name, each in stages if not isinstance(each, EvaluateStage)]
        code = local.run_stages(run, names, measure=True)
        if code:
            raise typer.Exit(code)
        return {
            name: [read_json(run.stage(name).memory(rank)) for rank in range(source.spec.launch.procs)]
            for name, each in stages
            if isinstance(each, TrainStage)
        }


def stage(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    names: Annotated[list[str], typer.Argument(metavar="STAGE...")],
    lifeline: Annotated[int | None, typer.Option(help="A pipe whose other end is held by whoever started us.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Note what training takes of memory.")] = False,
) -> None:
    """Compute stages of a run in this process; with RANK and WORLD_SIZE set, as one of several that train together."""
    from distill import claims, specfile
    from distill.launch import environment, local
    from distill.stop import StopRequest

    paths = find_run(run.parent, str(run))
    spec = specfile.load_run(paths)
    unknown = [name for name in names if name not in spec.stages]
    if unknown:
        raise InputError(f"run '{paths.name}' has no stage '{unknown[0]}'; valid: {', '.join(spec.stages)}")
    os.environ.setdefault("OMP_NUM_THREADS", str(spec.launch.threads or environment.threads()))
    with StopRequest() as stop:
        if lifeline is not None:
            local.watch(lifeline)
        if int(os.environ.get("RANK", "0")) == 0:
            with claims.claim(paths), _in_events(paths, names):
                _compute(paths, spec, names, stop, measure)
        else:  # the first speaks and writes for all
            _compute(paths, spec, names, stop, measure)


@contextmanager
def _in_events(paths: RunPaths, names: list[str]) -> Iterator[None]:
    """The run's events say what began here, and how it ended."""
    append_event(paths, "started", pid=os.getpid(), host=platform.node(), stages=names)
    outcome, message = "failed", ""
    try:
        yield
        outcome = "finished"
    except Stopped as stopped:
        outcome, message = "stopped", str(stopped)
        raise Stopped(f"{stopped}: distill run {near(paths.root)} --resume") from None
    except KeyboardInterrupt:
        outcome, message = "stopped", "interrupted without saving"
        raise
    finally:
        error = sys.exception()
        append_event(paths, outcome, message=message or ("" if error is None else _brief(error)))


def _compute(
    paths: RunPaths, spec: "distill.spec.RunSpec", names: list[str], stop: "distill.stop.StopRequest", measure: bool
) -> None:
    from distill import stages  # torch comes with it

    if "WORLD_SIZE" not in os.environ:
        stop.raise_if_requested("nothing had begun")
        stages.run(paths, spec, names, stop, measure=measure)
    else:  # none leaves before all have met: the others would wait for it
        from distill.world import World

        def lost(message: str) -> None:
            if int(os.environ["RANK"]) == 0:
                append_event(paths, "failed", message=message)

        device = stages.place(spec.launch)
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # it would end us before we have said where
        world = World.join(device, spec.launch.collective_minutes, int(os.environ["LOCAL_RANK"]), lost)
        stages.run(paths, spec, names, stop, world, measure=measure)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _find(given: str, changes: Sequence[str], name: str | None) -> "distill.specfile.SpecSource":
    """A spec by the path of its file, or by the name of a preset."""
    from distill import presets, specfile

    if "=" in given and not Path(given).exists():
        raise InputError(f"'{given}' stands where the spec is expected; write: distill run SPEC {given}")
    path = Path(given)
    if path.suffix in (".yaml", ".yml") or "/" in given or path.is_file():
        if not path.exists():
            raise InputError(f"there is no spec {path}; give a YAML file or a preset: {', '.join(presets.names())}")
        return specfile.load(path, changes, name=name)
    if given not in presets.names():
        raise InputError(f"there is no spec file and no preset '{given}'; {suggest(given, presets.names())}")
    return specfile.load(presets.find(given), changes, name=name, source=f"preset '{given}'")


def _checked(source: "distill.specfile.SpecSource") -> "distill.specfile.SpecSource":
    """The spec, once everything is known to fit that can be known before it runs."""
    from distill import workflow

    workflow.check(source.spec, source.base)
    spec = workflow.locate_options(source.spec, source.base)
    from distill import stages  # torch comes with it

    stages.place(spec.launch)
    stages.check(spec, source.base)
    return replace(source, spec=spec)


def _start(folder: Path, source: "distill.specfile.SpecSource") -> RunPaths:
    """A new run in the store, complete or not at all."""
    from distill import specfile
    from distill.launch import environment

    paths = RunPaths(folder.absolute() / source.spec.name)
    if paths.root.exists():
        raise InputError(name_in_use(paths))
    source = _checked(source)
    kinds = {name: each.kind for name, each in source.spec.stages.items()}
    files: dict[str, str | bytes] = {
        "events.jsonl": event_line("created", digest=source.spec.digest(), stages=kinds),
        "spec.yaml": f"# distill {one_line(shlex.join(sys.argv[1:]))}\n{specfile.resolved(source.spec)}",
        "env.json": jsons.dumps(environment.record(), indent=2) + "\n",
        **_own_recipes(source),
    }
    return create_run(folder, source.spec.name, files)


def _own_recipes(source: "distill.specfile.SpecSource") -> dict[str, str | bytes]:
    """The user's own recipe files, which a run keeps a copy of."""
    from distill import registry
    from distill.spec import TrainStage

    names = {stage.recipe for stage in source.spec.stages.values() if isinstance(stage, TrainStage)}
    found = {name: registry.own_file(name, source.base) for name in sorted(names)}
    return {str(Path(name)): path.read_bytes() for name, path in found.items() if path is not None}


def _resume(
    folder: Path, given: str, changes: Sequence[str], name: str | None
) -> tuple[RunPaths, "distill.spec.RunSpec"]:
    """An existing run, once the spec given is the run's own in all but `launch`."""
    from distill import claims, specfile, workflow

    if (folder / given / "spec.yaml").is_file() or (Path(given) / "spec.yaml").is_file():
        paths = find_run(folder, given)
        if name not in (None, paths.name):
            raise InputError(f"--name {name} has no effect when run '{paths.name}' is resumed; leave it out")
        source = specfile.load(paths.spec, changes)
    else:
        source = _find(given, changes, name)
        paths = RunPaths(folder.absolute() / source.spec.name)
        if not paths.spec.is_file():
            raise InputError(
                f"there is no run '{source.spec.name}' in {folder} to go on with; leave --resume out to start it"
            )
    claims.refuse_if_executing(paths)
    old = specfile.load_run(paths)
    if workflow.pending(paths, old):
        source = _checked(source)
    else:
        source = replace(source, spec=workflow.locate_options(source.spec, source.base))
    changed = [line for line in specfile.differences(old, source.spec) if not line.startswith(("launch.", "name:"))]
    for recipe, content in _own_recipes(source).items():
        if content != (paths.root / recipe).read_bytes():
            changed.append(f"recipe ./{recipe}: its file has changed")
    if changed:
        raise InputError(
            "\n  ".join([f"run '{paths.name}' cannot go on with a changed spec (only launch may change):", *changed])
            + "\nstart another run by --name OTHER, or undo the change"
        )
    moved = specfile.differences(old, source.spec.model_copy(update={"name": old.name}))
    if moved:
        write_atomic(paths.spec, specfile.resolved(source.spec.model_copy(update={"name": old.name})))
        append_event(paths, "launch changed", changes=moved)
    return paths, source.spec


def _execute(paths: RunPaths, spec: "distill.spec.RunSpec", *, fresh: bool = False) -> None:
    """Compute what is not done; leave with the exit code of the process that did it.

    fresh: the run was made just now, so that nothing of it stays if its process refuses it before any work.
    """
    from distill import workflow
    from distill.launch import local

    pending = workflow.pending(paths, spec)
    for name in workflow.lost_pairs(paths, spec):
        print(f"the pairs of stage '{name}' are gone or damaged, and still needed: they are made again")
        paths.stage(name).done.unlink()
    if pending:
        print(f"run '{paths.name}' in {near(paths.root)}: {', '.join(pending)}", flush=True)
        code = local.run_stages(paths, pending)
        if code == EXIT_INPUT and fresh and not any(path.is_file() for path in paths.root.glob("stages/**/*")):
            shutil.rmtree(paths.root)
        if code:
            raise typer.Exit(code)
    else:
        print(f"all stages of run '{paths.name}' are done")
    _farewell(paths)


def _farewell(paths: RunPaths) -> None:
    """Where everything lies, and the tables."""
    print_results(paths)
    rows = [("run", paths.root), *((f"student {p.name}", p) for p in sorted(paths.students.glob("*")) if p.is_dir())]
    rows += [("report", paths.report)] if paths.report.exists() else []
    for label, path in rows:
        print(f"{label:<20} {near(path)}")
