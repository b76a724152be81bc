"""Who executes a run: one process at a time, also after a kill -9, also when two start at once. No file locks.

A claim is the folder `running`, renamed into place with its owner's record inside, which succeeds for one process only.
The claim of a dead process is renamed away to a name made from that very process, and left there: whoever comes late
with the same intention finds that name taken, and cannot remove a claim that is newer than the one it judged.

Jobs of a cluster execute units of a run (a stage, a part of one) side by side: each claims its unit. A run is not
claimed while a unit is, nor a unit while the run is.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from distill import records
from distill.guard import InputError, RunError
from distill.owners import Owner as Owner  # for all who hold a run
from distill.store import RunPaths, write_json

GRACE = 2.0  # seconds; a process that was killed a moment ago may still be on its way out
RECORD = "owner.json"
OWNER: records.Schema[Owner] = records.Schema(Owner)


def owner(place: Path) -> Owner | None:
    """Who holds a claim, dead or alive; None: nobody."""
    try:
        return records.load(place / RECORD, OWNER, "")
    except FileNotFoundError:
        return None
    except InputError as error:
        raise InputError(f"{place} cannot be read; if no process executes this run, remove that folder") from error


def held(run: RunPaths) -> dict[Path, Owner]:
    """Every claim on the run or a unit of it, dead or alive."""
    units = [name for name in records.names(run.units) if not name.startswith(".")]
    found = {place: owner(place) for place in (run.running, *(run.units / name for name in units))}
    return {place: each for place, each in found.items() if each is not None}


def executing(run: RunPaths) -> Owner | None:
    """A process that executes the run, or a unit of it, now; None: nobody does."""
    return next((each for each in _alive(run).values()), None)


def _alive(run: RunPaths) -> dict[Path, Owner]:
    return {place: each for place, each in held(run).items() if each.is_alive()}


def bury(run: RunPaths, place: Path, dead: Owner) -> None:
    """Take a claim away from an owner that is known to be gone."""
    with suppress(OSError):  # another process has done so before
        place.rename(_grave(run, dead))


def _grave(run: RunPaths, dead: Owner) -> Path:
    return run.root / f".dead-{_token(dead)}"


def refuse_if_executing(run: RunPaths) -> None:
    """InputError if another process executes the run."""
    deadline = time.monotonic() + GRACE
    while alive := _alive(run):
        place, other = next(iter(alive.items()))
        if time.monotonic() > deadline or not other.is_here:
            raise InputError(_held_by(run, other, place))
        time.sleep(0.1)


@contextmanager
def claim(run: RunPaths, unit: str | None = None, me: Owner | None = None) -> Iterator[None]:
    """Hold the run while entered, or a unit of it; InputError if another process does, or holds what overlaps.

    me: the process that is to hold it, if it is one of a job.
    """
    me = me or Owner.this()
    place = run.running if unit is None else run.units / unit
    mine = run.root / f".running-{_token(me)}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        mine.mkdir(exist_ok=True)
        write_json(mine / RECORD, asdict(me))
    except OSError as error:
        raise RunError(f"cannot write into {run.root}: {error.strerror}; nothing was changed") from error
    try:
        _take(run, place, mine, me)
    finally:
        if mine.exists():
            shutil.rmtree(mine)
    try:
        _refuse_overlap(run, place)
        yield
    finally:
        place.rename(mine)
        shutil.rmtree(mine)


def _take(run: RunPaths, place: Path, mine: Path, me: Owner) -> None:
    deadline = time.monotonic() + GRACE
    while True:
        with suppress(OSError):  # the folder is there and not empty
            mine.rename(place)
            return
        found = owner(place)
        if found is None:  # it was given back between the two lines above
            if time.monotonic() > deadline:
                raise InputError(f"{place} says nothing of who made it; if nobody executes the run, remove it")
            time.sleep(0.01)
        elif not found.is_alive() or (found.job == me.job != "" and found.restart < me.restart):
            bury(run, place, found)
            if owner(place) == found:  # the name that it is to get is taken
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{place} is of process {found.pid}, which is gone, and cannot be renamed to "
                        f"{_grave(run, found).name}; remove both folders"
                    )
                time.sleep(0.01)
        elif time.monotonic() > deadline or not found.is_here:
            raise InputError(_held_by(run, found, place))
        else:
            time.sleep(0.1)


def _refuse_overlap(run: RunPaths, mine: Path) -> None:
    """Two that claim what overlaps at once both look after they have claimed: at least one of them leaves."""
    for place, found in _alive(run).items():
        if place != mine and run.running in (place, mine):
            raise InputError(_held_by(run, found, place))


def _held_by(run: RunPaths, found: Owner, place: Path) -> str:
    if found.job:
        return f"run '{run.name}' is being executed by job {found.job}; wait for it, or: distill cancel {run.name}"
    if found.is_here:
        return f"run '{run.name}' is being executed by process {found.pid}; wait for it, or stop it: kill {found.pid}"
    return (
        f"run '{run.name}' is being executed by process {found.pid} on {found.host}; "
        f"if that process is gone, remove {place}"
    )


def _token(process: Owner) -> str:
    """A name that only this process has, and that leads nowhere, whatever its record says."""
    told = json.dumps([process.host, process.pid, process.boot, process.start])
    return hashlib.sha256(told.encode()).hexdigest()[:24]
