"""Who executes a run: one process at a time, also after a kill -9, also when two start at once. No file locks.

A claim is the folder `running`, renamed into place with its owner's record inside, which succeeds for one process only.
To take over a dead process's claim, rename it to a name made from that process and its last renewal. The rename works
once, so two takers cannot both succeed, and nobody can remove a claim that is newer than the one that they judged.

Whether a process of the same machine and pid namespace is alive is looked up. One of another host or container, or from
before a restart of this machine, counts as alive while its claim is renewed (see `lease`), and as gone 120 s after the
last renewal. Earlier versions do not renew: such a claim of another host is valid until somebody removes it.

Jobs of a cluster execute units of a run (a stage, a part of one) side by side: each claims its unit. A run is not
claimed while a unit is, nor a unit while the run is.
"""

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, NoReturn

from pydantic import Field, ValidationError

from distill.core import lease, records
from distill.core.atomic import write_atomic
from distill.core.errors import EXIT_FAILED, InputError, RunError
from distill.core.owners import Owner
from distill.core.text import printable
from distill.runs.run_store import RunPaths

GRACE = 2.0  # seconds; a process that was killed a moment ago may still be on its way out
RECORD = "owner.json"
OWNER: records.Schema[Owner] = records.Schema(Owner)


@dataclass(frozen=True)
class Renewal:
    """What a claim's record says beyond its owner."""

    every: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """seconds between two renewals; 0: it is never renewed, as by earlier versions"""


RENEWAL: records.Schema[Renewal] = records.Schema(Renewal)


@dataclass(frozen=True)
class Found:
    """A claim as it was found."""

    place: Path
    owner: Owner
    every: float
    """as of `Renewal`"""
    renewed: int
    """nanoseconds, by the clock of the file system"""

    @property
    def can_be_looked_up(self) -> bool:
        """Whether its process can be, so that the age of its renewal says nothing."""
        return self.every == 0 or (self.owner.is_here and self.owner.is_of_this_boot)


def _look(place: Path) -> Found | None:
    """The claim at a place; None: there is none."""
    remedy = f"{place} cannot be read; if no process executes this run, remove that folder"
    try:
        with records.open_regular(place / RECORD) as file:
            renewed, content = os.fstat(file.fileno()).st_mtime_ns, file.read(records.SMALL)
        return Found(place, OWNER.parse(content), RENEWAL.parse(content).every, renewed)
    except FileNotFoundError:
        return None
    except (InputError, ValidationError) as error:
        raise InputError(remedy) from error


def owner(place: Path) -> Owner | None:
    """The owner of a claim, dead or alive; None: there is none."""
    found = _look(place)
    return None if found is None else found.owner


def held(run: RunPaths) -> dict[Path, Owner]:
    """Every claim on the run or a unit of it, dead or alive."""
    return {found.place: found.owner for found in _all(run)}


def _all(run: RunPaths) -> list[Found]:
    units = [name for name in records.names(run.units) if not name.startswith(".")]
    claims = [_look(place) for place in (run.running, *(run.units / name for name in units))]
    return [found for found in claims if found is not None]


def executing(run: RunPaths) -> Owner | None:
    """A process that executes the run, or a unit of it, now; None: there is none."""
    return next((found.owner for found in _all(run) if _is_alive(run, found)), None)


def _is_alive(run: RunPaths, found: Found) -> bool:
    return found.owner.is_alive() if found.can_be_looked_up else _seconds_left(run, found) > 0


def _seconds_left(run: RunPaths, found: Found) -> float:
    """Until a claim counts as given up, unless it is renewed.

    A renewal in the far future, by a clock that was set back since, is worth as little as one that is as long ago.
    """
    limit, age = lease.MISSED * found.every, (_now(run.root) - found.renewed) / 1e9
    return limit - age if age > -limit else 0.0


def _now(folder: Path) -> int:
    """The time in nanoseconds by the clock of the file system that holds a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.utime(file.fileno())
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:  # we may not write there: we only look
        return time.time_ns()


def bury(run: RunPaths, place: Path, dead: Owner) -> None:
    """Take a claim away from an owner that is known to be gone."""
    found = _look(place)
    if found is not None and found.owner == dead:
        _bury(run, found)


def _bury(run: RunPaths, dead: Found) -> None:
    with suppress(OSError):  # another process has done so before, or the claim was renewed
        dead.place.rename(_grave(run, dead.owner, dead.renewed))


def _grave(run: RunPaths, dead: Owner, renewed: int) -> Path:
    """Where a claim goes whose last renewal was this one."""
    return run.root / f".dead-{sha256(f'{dead.token} {renewed}'.encode()).hexdigest()[:24]}"


def refuse_if_executing(run: RunPaths) -> None:
    """InputError if another process executes the run."""
    deadline = time.monotonic() + GRACE
    while alive := [found for found in _all(run) if _is_alive(run, found)]:
        if time.monotonic() > deadline or not alive[0].owner.is_here:
            raise InputError(_held_by(run, alive[0]))
        time.sleep(0.1)


@contextmanager
def claim(
    run: RunPaths,
    unit: str | None = None,
    me: Owner | None = None,
    note: Callable[[str], None] = lambda message: None,
    every: float = lease.EVERY,
) -> Iterator[None]:
    """Hold the run while entered, or a unit of it; InputError if another process does, or holds what overlaps.

    me: the process that is to hold it, if it is one of a job. every: seconds between two renewals.
    note: called with the reason before this process ends at once, with code 1, because another has taken the run over.
    """
    me, process = me or Owner.this(), os.getpid()
    place = run.running if unit is None else run.units / unit
    mine = run.root / f".running-{me.token}"
    content = (json.dumps(asdict(me) | {"every": every}, indent=2) + "\n").encode()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        mine.mkdir(exist_ok=True)
        write_atomic(mine / RECORD, content)
    except OSError as error:
        raise RunError(f"cannot write into {run.root}: {error.strerror}; nothing was changed") from error
    try:
        _take(run, place, mine, me)
    finally:
        if mine.exists():
            shutil.rmtree(mine)
    kept = lease.Lease(place / RECORD, content, every, partial(_grave, run, me), partial(_leave, run, place, me, note))
    kept.start()
    try:
        _refuse_overlap(run, place)
        yield
    finally:
        if os.getpid() == process:  # not in a child that was forked meanwhile
            kept.stop()
            if owner(place) == me:
                place.rename(mine)
                shutil.rmtree(mine)


def _leave(run: RunPaths, place: Path, me: Owner, note: Callable[[str], None]) -> NoReturn:
    """End this process, whose claim is gone, before any of its threads writes more.

    A request to stop, as after a signal, would not do: the process would save first.
    """
    other = None
    with suppress(InputError, OSError):
        other = owner(place)
    if other is None or other == me:
        what = f"the claim {place} of this process is gone: it was removed, or another process is taking over"
    else:
        what = (
            f"process {other.pid} on {other.host} has taken over run '{run.name}', because this process ({me.pid} on "
            f"{me.host}) was suspended or could not reach {run.root} for too long"
        )
    message = (
        f"{what}; this process ends and writes nothing more; what was saved is intact. To resume here once no other "
        f"process executes the run: distill run {run.root} --resume"
    )
    with suppress(OSError):
        os.write(2, printable(f"error: {message}\n").encode())  # print might wait for another thread
    with suppress(OSError):
        note(message)
    os._exit(EXIT_FAILED)


def _take(run: RunPaths, place: Path, mine: Path, me: Owner) -> None:
    deadline = time.monotonic() + GRACE
    while True:
        with suppress(OSError):  # the folder is there and not empty
            mine.rename(place)
            return
        found = _look(place)
        if found is None:  # it was given back between the two lines above
            if time.monotonic() > deadline:
                raise InputError(
                    f"{place} does not say which process made it; if no process executes the run, remove it"
                )
            time.sleep(0.01)
        elif (found.owner.job == me.job != "" and found.owner.restart < me.restart) or not _is_alive(run, found):
            _bury(run, found)
            if _look(place) == found:  # the name that it is to get is taken
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{place} is of process {found.owner.pid}, which is gone, and cannot be renamed to "
                        f"{_grave(run, found.owner, found.renewed).name}; remove both folders"
                    )
                time.sleep(0.01)
        elif time.monotonic() > deadline or not found.owner.is_here:
            raise InputError(_held_by(run, found))
        else:
            time.sleep(0.1)


def _refuse_overlap(run: RunPaths, mine: Path) -> None:
    """Two that claim what overlaps at once both look after they have claimed: at least one of them leaves."""
    for found in _all(run):
        if found.place != mine and run.running in (found.place, mine) and _is_alive(run, found):
            raise InputError(_held_by(run, found))


def _held_by(run: RunPaths, found: Found) -> str:
    other = found.owner
    if other.job:
        return f"run '{run.name}' is being executed by job {other.job}; wait for it, or: distill cancel {run.name}"
    said = f"run '{run.name}' is being executed by process {other.pid}"
    if not found.can_be_looked_up:
        container = " in another container" if other.is_of_this_boot else ""
        seconds = max(1, math.ceil(_seconds_left(run, found)))
        return (
            f"{said}{container} on {other.host}; wait for it, or stop it there; if that process is gone, run this "
            f"command again in {seconds} s"
        )
    if other.is_here:
        return f"{said}; wait for it, or stop it: kill {other.pid}"
    return f"{said} on {other.host}; if that process is gone, remove {found.place}"
