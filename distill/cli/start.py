"""Finds specs and runs that the user names, validates specs, and creates runs or prepares to resume them."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from distill.cli.common import one_line
from distill.core.atomic import write_atomic
from distill.core.collection import importing
from distill.core.errors import InputError
from distill.core.printing import say
from distill.core.text import printable, suggest
from distill.runs import run_store
from distill.runs.run_store import (
    RunPaths,
    append_event,
    create_run,
    event_line,
    find_run,
    name_in_use,
    refuse_reserved,
)

if TYPE_CHECKING:
    import distill.execution.building
    import distill.execution.preflight
    import distill.spec.model
    import distill.spec.specfile

# What may change when a run is resumed. Neither changes a sample: images that cannot be read are replaced anyway.
MAY_CHANGE = ("launch.", "data.max_unreadable:")


def find(given: str, changes: Sequence[str], name: str | None) -> "distill.spec.specfile.SpecSource":
    """Load a spec by the path of its file or the name of a preset. name: replaces the name of the run."""
    from distill.spec import specfile

    path, source = locate(given)
    return specfile.load(path, changes, name=name, source=source)


def locate(given: str) -> tuple[Path, str]:
    """(file, name in messages) of a spec or a preset. InputError if there is none."""
    from distill.spec import presets

    if "=" in given and not Path(given).exists():
        raise InputError(
            f"the first argument must be a spec or preset, not an override ('{given}'); e.g. distill run SPEC {given}"
        )
    path = Path(given)
    if path.suffix in (".yaml", ".yml") or "/" in given or path.is_file():
        if not path.exists():
            raise InputError(f"there is no spec {path}; give a YAML file or a preset: {', '.join(presets.names())}")
        return path, str(path)
    if given not in presets.names():
        raise InputError(f"there is no spec file and no preset '{given}'; {suggest(given, presets.names())}")
    return presets.find(given), f"preset '{given}'"


def checked(
    source: "distill.spec.specfile.SpecSource",
    *,
    here: bool = True,
    store: Path | None = None,
    new: bool = False,
    visit: "distill.execution.preflight.Visit | None" = None,
) -> "distill.execution.preflight.Ready":
    """Resolve a spec, and check everything that can be checked before it runs, including its teacher and data.

    Raises InputError if a check fails. here: it will run on this machine, so its devices are checked too.
    store: the store, which may already have an index of the data. If the store exists, it keeps the index, so that
    the data need not be read again if a check fails. new: a run will be created, so the store may be created, too.
    Its name must not be taken. visit: called with the networks of each train stage.
    """
    from distill.spec import checks

    refuse_reserved(source.spec.name)
    if new and store is not None:
        refuse_taken(store, source)
    resolved = checks.check(source.spec, source.base)
    spec = resolved.spec
    if here and spec.launch.nodes > 1:
        raise InputError(
            f"launch.nodes={spec.launch.nodes}: distill run uses one machine; use distill submit, or launch.nodes=1"
        )
    with importing():
        from distill.execution import devices, preflight  # imports torch

    if here:
        devices.place(spec.launch, spec.launch.procs, spec.numerics)
    return preflight.check(resolved, store, keep_index=store is not None and (new or store.is_dir()), visit=visit)


def begin(folder: Path, source: "distill.spec.specfile.SpecSource") -> RunPaths:
    """Validate a spec for this machine, and create its run."""
    return create(folder, replace(source, spec=checked(source, store=folder, new=True).resolved.spec))


def refuse_taken(folder: Path, source: "distill.spec.specfile.SpecSource") -> None:
    """Raise InputError if the store already has a run (or any folder) of the spec's name."""
    paths = RunPaths(folder.absolute() / source.spec.name)
    if paths.root.exists():
        raise InputError(name_in_use(paths))


def create(
    folder: Path, source: "distill.spec.specfile.SpecSource", more: Mapping[str, str | bytes] | None = None
) -> RunPaths:
    """Create the run of a validated spec, atomically. more: additional files (relative path -> content)."""
    from distill.launch import environment
    from distill.spec import specfile
    from distill.spec.model import CheckpointTeacher

    kinds = {name: each.kind for name, each in source.spec.stages.items()}
    files: dict[str, str | bytes] = {
        run_store.CREATED: event_line("created", digest=source.spec.digest(), stages=kinds),
        "spec.yaml": f"# distill {one_line(shlex.join(sys.argv[1:]))}\n{specfile.resolved(source.spec)}",
        "env.json": json.dumps(environment.record(), indent=2) + "\n",
        **_own_recipes(source),
        **(more or {}),
    }
    if source.spec.data.place is not None:
        from distill import data  # imports torch

        run_store.make(folder)
        data.update_index(source.spec.data, folder.absolute())  # store the index of the check for the run's processes
        files |= data.run_files(source.spec.data)
    if isinstance(source.spec.teacher, CheckpointTeacher) and source.spec.teacher.conditions is not None:
        from distill.teachers import conditions

        run_store.make(folder)
        conditions.keep_checksums(source.spec.teacher, folder.absolute())
    return create_run(folder, source.spec.name, files)


def say_stream(spec: "distill.spec.model.RunSpec", run: RunPaths | None = None) -> None:
    """Say that the data of a spec is read over the network while it trains, if so. run: has the commit that is read."""
    if (place := spec.data.remote) is None:
        return
    commit = None
    if run is not None:
        from distill import data

        commit = data.streamed_commit(spec.data, run.root)
    at = "" if commit is None else f" (commit {commit[:12]})"
    say(f"data {printable(place)}{at} is streamed, not downloaded: each process that trains needs the network")


def _own_recipes(source: "distill.spec.specfile.SpecSource") -> dict[str, str | bytes]:
    """Relative path -> content of the user's own recipes, which are copied into the run."""
    from distill.spec import registry
    from distill.spec.model import TrainStage

    names = {stage.recipe for stage in source.spec.stages.values() if isinstance(stage, TrainStage)}
    found = {name: registry.own_file(name, source.base) for name in sorted(names)}
    return {str(Path(name)): path.read_bytes() for name, path in found.items() if path is not None}


def resume(
    paths: RunPaths, source: "distill.spec.specfile.SpecSource"
) -> tuple[RunPaths, "distill.spec.model.RunSpec"]:
    """(run, spec) to resume on this machine. InputError if it is running, or the spec differs in more than `launch`."""
    from distill.runs import claims

    claims.refuse_if_executing(paths)
    return paths, go_on(paths, source)


def is_spec(given: str) -> bool:
    """Whether the text is the path of a file or the name of a preset."""
    from distill.spec import presets

    return Path(given).is_file() or given in presets.names()


def is_run(folder: Path, given: str) -> bool:
    """Whether the text is the name of a run in the store or the path of a run."""
    return run_store.is_run(folder / given) or run_store.is_run(Path(given))


def find_again(
    folder: Path, given: str, changes: Sequence[str], name: str | None
) -> tuple[RunPaths, "distill.spec.specfile.SpecSource"]:
    """(existing run, spec to resume it with). given: a run, or a spec whose name is that of the run."""
    from distill.spec import specfile

    if not is_run(folder, given):
        return again(folder, find(given, changes, name))
    paths = find_run(folder, given)
    if name not in (None, paths.name):
        raise InputError(f"--name {name} has no effect when run '{paths.name}' is resumed; leave it out")
    return paths, specfile.load(paths.spec, changes)


def again(
    folder: Path, source: "distill.spec.specfile.SpecSource"
) -> tuple[RunPaths, "distill.spec.specfile.SpecSource"]:
    """(existing run of the spec's name, the spec). InputError if there is no such run."""
    paths = RunPaths(folder.absolute() / source.spec.name)
    if not paths.spec.is_file():
        raise InputError(f"there is no run '{source.spec.name}' in {folder} to resume; start it without --resume")
    return paths, source


def go_on(
    paths: RunPaths,
    source: "distill.spec.specfile.SpecSource",
    *,
    here: bool = True,
    live: Sequence[str] = (),
    trains: bool = True,
) -> "distill.spec.model.RunSpec":
    """Check that an existing run can be resumed with a spec, and return the spec.

    Only the fields of `MAY_CHANGE` may differ; their new values are written to the run. Raises InputError for any other
    difference.

    here: see `checked`. live: ids of jobs that use the old spec; if there are any, it must not change.
    trains: this version of distill will train the unfinished stages, so its random numbers must be those of the run.
    """
    from distill.core import versions
    from distill.runs import machine, todo
    from distill.spec import resolved, specfile
    from distill.spec.model import TrainStage

    old = todo.load_spec(paths)
    pending = todo.pending(paths, old)
    if trains and any(isinstance(old.stages[name], TrainStage) for name in pending):
        versions.require_same_draws(machine.load(paths).draws, f"run '{paths.name}'")
    if pending:
        new = checked(source, here=here, store=paths.root.parent).resolved.spec
    else:
        new = resolved.resolve(source.spec, source.base).spec
    source = replace(source, spec=new)
    changed = [line for line in specfile.differences(old, source.spec) if not line.startswith(("name:", *MAY_CHANGE))]
    for recipe, content in _own_recipes(source).items():
        if content != (paths.root / recipe).read_bytes():
            changed.append(f"recipe ./{recipe}: its file has changed")
    if changed:
        may_change = "only launch and data.max_unreadable may change"
        said = f"run '{paths.name}' cannot be resumed with a changed spec ({may_change}):"
        raise InputError("\n  ".join([said, *changed]) + "\nstart another run with --name OTHER, or undo the change")
    moved = specfile.differences(old, source.spec.model_copy(update={"name": old.name}))
    if moved and live:
        raise InputError(
            f"jobs of run '{paths.name}' are running or queued ({', '.join(live)}), so the spec cannot change "
            f"({'; '.join(moved)}); wait for them, or: distill cancel {paths.name}"
        )
    if moved:
        write_atomic(paths.spec, specfile.resolved(source.spec.model_copy(update={"name": old.name})))
        append_event(paths, "spec changed", changes=moved)
    return source.spec
