"""Claims: only one process executes a run at a time, even after a kill -9 or if two processes start together.

No file locks are used. A claim is the folder `running` with a record of its owner. It is renamed into place, which
succeeds for one process only. A claim of a dead process is taken over by renaming it to a name made from that process
and its last renewal. A rename succeeds only once, so two processes cannot both take it over. No process can remove a
newer claim than the one that it has checked.

An owner in the same pid namespace of this machine, started since its last boot, is looked up to see if it is alive. Any
other owner (on another host, in another container, or from before a reboot) counts as alive while it renews its claim
(see `core.lease`), and as dead 120 s after the last renewal. Earlier versions do not renew their claims: such a claim
from another host is valid until someone removes it.

Cluster jobs execute units of a run (a stage, or a part of one) in parallel, and each job claims its unit. The whole run
and one of its units cannot be claimed at the same time.
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

GRACE = 2.0  # seconds to wait for the owner, which may have just been killed and not have exited yet
RECORD = "owner.json"
OWNER: records.Schema[Owner] = records.Schema(Owner)


@dataclass(frozen=True)
class Renewal:
    """The fields of a claim's record in addition to its owner."""

    every: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """seconds between two renewals; 0: not renewed (earlier versions)"""


RENEWAL: records.Schema[Renewal] = records.Schema(Renewal)


@dataclass(frozen=True)
class Found:
    """A claim that was read, with the time of its last renewal."""

    place: Path
    owner: Owner
    every: float
    """see `Renewal`"""
    renewed: int
    """time of the last renewal in nanoseconds, by the clock of the file system"""

    @property
    def can_be_looked_up(self) -> bool:
        """Whether the owner itself tells if the claim is valid, so that the age of the renewal is ignored.

        This also holds for claims that are never renewed.
        """
        return self.every == 0 or (self.owner.is_here and self.owner.is_of_this_boot)


def _look(place: Path) -> Found | None:
    """Read the claim at a path; None if there is none. InputError if it is damaged."""
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
    """The owner of the claim at a path, dead or alive; None if there is no claim."""
    found = _look(place)
    return None if found is None else found.owner


def held(run: RunPaths) -> dict[Path, Owner]:
    """Path -> owner of every claim on the run or its units, dead or alive."""
    return {found.place: found.owner for found in _all(run)}


def _all(run: RunPaths) -> list[Found]:
    units = [name for name in records.names(run.units) if not name.startswith(".")]
    claims = [_look(place) for place in (run.running, *(run.units / name for name in units))]
    return [found for found in claims if found is not None]


def executing(run: RunPaths) -> Owner | None:
    """A live process that executes the run or a unit of it; None if there is none."""
    return next((found.owner for found in _all(run) if _is_alive(run, found)), None)


def _is_alive(run: RunPaths, found: Found) -> bool:
    return found.owner.is_alive() if found.can_be_looked_up else _seconds_left(run, found) > 0


def _seconds_left(run: RunPaths, found: Found) -> float:
    """Seconds until a claim counts as given up, unless it is renewed.

    A renewal too far in the future counts as given up too: the clock must have been set back since.
    """
    limit, age = lease.MISSED * found.every, (_now(run.root) - found.renewed) / 1e9
    return limit - age if age > -limit else 0.0


def _now(folder: Path) -> int:
    """The time in nanoseconds by the clock of the file system that holds a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.utime(file.fileno())
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:  # no permission to write: use the clock of this host
        return time.time_ns()


def bury(run: RunPaths, place: Path, dead: Owner) -> None:
    """Remove a claim whose owner is known to be dead, by moving it to its grave."""
    found = _look(place)
    if found is not None and found.owner == dead:
        _bury(run, found)


def _bury(run: RunPaths, dead: Found) -> None:
    with suppress(OSError):  # another process has already done this, or the claim was renewed
        dead.place.rename(_grave(run, dead.owner, dead.renewed))


def _grave(run: RunPaths, dead: Owner, renewed: int) -> Path:
    """The path to which a claim is moved when it is taken over; it depends on the owner and its last renewal."""
    return run.root / f".dead-{sha256(f'{dead.token} {renewed}'.encode()).hexdigest()[:24]}"


def refuse_if_executing(run: RunPaths) -> None:
    """Raise InputError if another process executes the run or a unit of it."""
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
    """Context manager that holds a claim on the run, or on a unit of it.

    Raises InputError if another process holds this claim or an overlapping one, and RunError if the claim cannot be
    written. If the claim is lost later, this process ends at once with exit code 1.

    me: the owner to record; None: this process without a job. every: seconds between two renewals.
    note: called with the reason before the process ends because it has lost its claim.
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
        if os.getpid() == process:  # not in a forked child
            kept.stop()
            if owner(place) == me:
                place.rename(mine)
                shutil.rmtree(mine)


def _leave(run: RunPaths, place: Path, me: Owner, note: Callable[[str], None]) -> NoReturn:
    """End this process, which has lost its claim, before any of its threads writes anything more.

    A normal stop, as after a signal, is not possible here, since the process would save first.
    """
    other = None
    with suppress(InputError, OSError):
        other = owner(place)
    if other is None or other == me:
        what = f"the lock folder {place} of this process was deleted, or another process is taking over the run"
    else:
        what = (
            f"process {other.pid} on {other.host} has taken over run '{run.name}', because this process ({me.pid} on "
            f"{me.host}) was suspended or could not reach {run.root} for too long"
        )
    message = (
        f"{what}; this process exits and writes nothing more; what was saved is intact. When no other process executes "
        f"the run, you can resume it here with: distill run {run.root} --resume"
    )
    with suppress(OSError):
        os.write(2, printable(f"error: {message}\n").encode())  # print could wait for a lock of another thread
    with suppress(OSError):
        note(message)
    os._exit(EXIT_FAILED)


def _take(run: RunPaths, place: Path, mine: Path, me: Owner) -> None:
    deadline = time.monotonic() + GRACE
    while True:
        with suppress(OSError):  # another claim is there: the folder is not empty
            mine.rename(place)
            return
        found = _look(place)
        if found is None:  # the claim was released after the rename had failed
            if time.monotonic() > deadline:
                raise InputError(
                    f"the lock folder {place} does not name the process that created it; if no process executes the "
                    "run, delete this folder"
                )
            time.sleep(0.01)
        elif (found.owner.job == me.job != "" and found.owner.restart < me.restart) or not _is_alive(run, found):
            _bury(run, found)
            if _look(place) == found:  # it could not be renamed: the name of its grave is in use
                if time.monotonic() > deadline:
                    raise InputError(
                        f"the lock folder {place} of process {found.owner.pid}, which no longer exists, cannot be "
                        f"renamed to {_grave(run, found.owner, found.renewed).name}; delete both folders"
                    )
                time.sleep(0.01)
        elif time.monotonic() > deadline or not found.owner.is_here:
            raise InputError(_held_by(run, found))
        else:
            time.sleep(0.1)


def _refuse_overlap(run: RunPaths, mine: Path) -> None:
    """Raise InputError if a live process holds an overlapping claim.

    It is called after claiming. If two processes claim overlapping parts at the same time, at least one sees the other.
    """
    for found in _all(run):
        if found.place != mine and run.running in (found.place, mine) and _is_alive(run, found):
            raise InputError(_held_by(run, found))


def _held_by(run: RunPaths, found: Found) -> str:
    other = found.owner
    if other.job:
        return (
            f"run '{run.name}' is being executed by job {other.job}; wait for it, or stop it: distill cancel {run.name}"
        )
    said = f"run '{run.name}' is being executed by process {other.pid}"
    if not found.can_be_looked_up:
        container = " in another container" if other.is_of_this_boot else ""
        seconds = max(1, math.ceil(_seconds_left(run, found)))
        return (
            f"{said}{container} on {other.host}; wait for it, or stop it there; if that process no longer exists, run "
            f"this command again in {seconds} s"
        )
    if other.is_here:
        return f"{said}; wait for it, or stop it: kill {other.pid}"
    return f"{said} on {other.host}; if that process no longer exists, delete its lock folder {found.place}"
