"""`distill cache`: makes the caches of a spec in the store. Several processes can share the work."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli import start
from distill.cli.common import StoreOption, near, read_share, size, store_path
from distill.core.collection import importing
from distill.core.errors import InputError
from distill.core.printing import say
from distill.core.space import human
from distill.runs import run_store

if TYPE_CHECKING:
    import distill.execution.caching
    import distill.runs.cached
    import distill.spec.model
    import distill.spec.resolved

ENDING = "shards that are complete are kept; run the same command again to make the rest"


def cache(
    given: Annotated[
        str,
        typer.Argument(metavar="SPEC|RUN", help="A spec with a cache stage, or a run whose caches are gone."),
    ],
    changes: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Changes of the spec.")] = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Share the work among N commands: this is command I, from 1 to N."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Make nothing, but compare what is there with its checksums.")
    ] = False,
    store: StoreOption = None,
    lifeline: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Make the caches of a spec in the store, without a run: latents of its images and embeddings of its prompts.

    All `launch.procs` processes share the work. Runs of the spec, and of any other spec with the same data, encoders
    and settings, then use these caches. `distill run` and `distill submit` make them, too, as a stage of the run.
    """
    share = (0, 1) if part is None else read_share("--part", part, 1)
    if verify and part is not None:
        raise InputError("--part has no effect with --verify; leave it out")
    folder = store_path(store)
    resolved, run = _resolved(folder, given, changes or [])
    if run is not None:
        folder = run.root.parent  # a run that is given by its path may be in another store
    with importing():
        from distill.core import file_checksums
        from distill.data import update_index
        from distill.execution.caching import Caching, keep_checksums
        from distill.runs import cached

    file_checksums.read(folder)
    if lifeline is not None:
        _as_rank(folder, resolved, share, lifeline)
        return
    run_store.make(folder)
    update_index(resolved.spec.data, folder.absolute())
    keep_checksums(resolved.spec, True, folder)
    made = Caching.of(resolved, folder.absolute(), folder.absolute())
    used = _used(made, run)  # before anything is made, which may take long
    for each in made.planned:
        say(_standing(made, each))
    if verify:
        _verify(made)
        return
    _make(folder, given, changes or [], part, made, share)
    made.tidy()
    if part is None or all(made.is_complete(each) for each in made.planned):
        for each in map(made.finished, made.planned):
            if run is not None and each.what in used:
                cached.refuse_other(run, used[each.what], each.digest)
        say(f"the caches are complete; {_next(given, run)}")
    else:
        say("this part is complete; run the other parts too")


def _resolved(
    store: Path, given: str, changes: list[str]
) -> tuple["distill.spec.resolved.Resolved", run_store.RunPaths | None]:
    """The spec, and its run if a run is given. InputError if it has no cache stage."""
    from distill.runs import todo
    from distill.spec import checks
    from distill.spec import resolved as resolving

    run = run_store.find_run(store, given) if start.is_run(store, given) else None
    if run is None:
        source = start.find(given, changes, None)
        found = checks.check(source.spec, source.base)
    else:
        if changes:
            raise InputError(
                f"'{changes[0]}' has no effect: '{given}' is a run, whose spec cannot change; leave it out"
            )
        found = resolving.of_run(todo.load_spec(run), run.root)
    if found.spec.cache is None:
        raise InputError(
            f"{'run' if run else 'spec'} '{found.spec.name}' has no cache stage; add one as the first of its stages, "
            "like cache: {kind: cache}"
        )
    return found, run


def _standing(made: "distill.execution.caching.Caching", each: "distill.runs.cached.UsedCache") -> str:
    """A line about what is there of a cache."""
    folder, count = made.place(each), made.shards(each)
    there = "not there yet" if not count else f"{count:,} of {each.files:,} shards are there, {human(size(folder))}"
    if made.is_complete(each):
        there = f"complete, {human(size(folder))}"
    return f"{each.what}: {each.count:,} {each.unit} in {near(folder)}: {there}"


def _verify(made: "distill.execution.caching.Caching") -> None:
    from distill import caches

    for each in made.planned:
        if not made.is_complete(each):
            raise InputError(f"{near(made.place(each))} is not complete; make it first, without --verify")
        caches.verify(made.place(each))
        say(f"{each.what}: all {each.files:,} shards have their checksums")


def _make(
    folder: Path,
    given: str,
    changes: list[str],
    part: str | None,
    made: "distill.execution.caching.Caching",
    share: tuple[int, int],
) -> None:
    """Make a share of the caches, in `launch.procs` processes."""
    from distill.core.stop import StopRequest
    from distill.execution import devices
    from distill.launch import environment, local

    launch = made.spec.launch
    if launch.procs == 1:
        with StopRequest() as stop:
            made.make_all(devices.place(launch), stop, share)
        return
    arguments = [given, *changes, f"--store={folder.absolute()}", *([] if part is None else [f"--part={part}"])]
    threads = launch.threads or max(1, environment.threads() // launch.procs)
    with tempfile.TemporaryDirectory(prefix="distill-") as logs:
        code = local.run_ranks(
            Path(logs), "distill", "cache", *arguments, size=launch.procs, threads=threads, ending=ENDING, apart=True
        )
    if code:
        raise typer.Exit(code)


def _as_rank(folder: Path, resolved: "distill.spec.resolved.Resolved", share: tuple[int, int], lifeline: int) -> None:
    """One of the processes that `_make` starts."""
    from distill.core.stop import StopRequest
    from distill.execution import devices
    from distill.execution.caching import Caching
    from distill.launch import local

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with StopRequest() as stop:
        local.watch(lifeline)
        made = Caching.of(resolved, folder.absolute(), folder.absolute())
        made.make_all(devices.of_rank(resolved.spec.launch, rank), stop, (share[0] + share[1] * rank, share[1] * count))


def _used(
    made: "distill.execution.caching.Caching", run: run_store.RunPaths | None
) -> Mapping["distill.runs.cached.What", "distill.runs.cached.UsedCache"]:
    """The caches that a run has used until now. InputError if its data and encoders do not give these any more."""
    from distill.runs import cached

    noted = [] if run is None else cached.noted(run, made.name) or []
    used = {each.what: each for each in noted if each.digest}
    for each in made.planned:
        before = used.get(each.what)
        if run is not None and before is not None and before.folder != each.folder:
            raise InputError(
                f"the {each.what} of run '{run.name}' were in {before.folder}, but its data and encoders now give "
                f"{each.folder}: they have changed. Restore them, or start another run"
            )
    return used


def _next(given: str, run: run_store.RunPaths | None) -> str:
    if run is None:
        return f"use them with: distill run {given}, or distill submit {given}"
    return f"go on with: distill run {near(run.root)} --resume"
