"""Who executes a run: one process at a time, also after a kill -9, also when two start at once. No file locks.

A claim is the folder `running`, renamed into place with its owner's record inside, which succeeds for one process only.
The claim of a dead process is renamed away to a name made from that very process, and left there: whoever comes late
with the same intention finds that name taken, and cannot remove a claim that is newer than the one it judged.
"""

import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.guard import InputError, RunError
from distill.store import RunPaths, read_json, write_json

GRACE = 2.0  # seconds; a process that was killed a moment ago may still be on its way out


@dataclass(frozen=True)
class Owner:
    """A process, told apart from later ones with the same number by its start time and the host's boot."""

    host: str
    boot: str
    pid: int
    start: str

    @classmethod
    def this(cls) -> "Owner":
        return cls(platform.node(), _boot(), os.getpid(), _start(os.getpid()) or "")

    @property
    def is_here(self) -> bool:
        return self.host == platform.node()

    @property
    def label(self) -> str:
        """In one word, for the names of folders that are its own."""
        return f"{self.pid},{self.start},{self.boot},{self.host}"

    @classmethod
    def of_label(cls, label: str) -> "Owner | None":
        """None: this is no label."""
        pid, start, boot, host = (*label.split(",", 3), "", "", "")[:4]
        return cls(host, boot, int(pid), start) if pid.isdigit() and host else None

    def is_alive(self) -> bool:
        """False once it is known to be gone; a process on another host counts as alive."""
        if not self.is_here:
            return True
        return self.boot == _boot() and _start(self.pid) == self.start


def owner(run: RunPaths) -> Owner | None:
    """Who holds the run, dead or alive; None: nobody."""
    try:
        return Owner(**read_json(run.running / "owner.json"))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{run.running} cannot be read; if no process executes this run, remove that folder"
        ) from error


def executing(run: RunPaths) -> Owner | None:
    """The process that executes the run now; None: nobody does."""
    held = owner(run)
    return held if held is not None and held.is_alive() else None


def refuse_if_executing(run: RunPaths) -> None:
    """InputError if another process executes the run."""
    deadline = time.monotonic() + GRACE
    while (held := executing(run)) is not None:
        if time.monotonic() > deadline or not held.is_here:
            raise InputError(_held_by(run, held))
        time.sleep(0.1)


@contextmanager
def claim(run: RunPaths) -> Iterator[None]:
    """Hold the run while entered; InputError if another process does."""
    me = Owner.this()
    mine = run.root / f".running-{_token(me)}"
    try:
        mine.mkdir(exist_ok=True)
        write_json(mine / "owner.json", asdict(me))
    except OSError as error:
        raise RunError(f"cannot write into {run.root}: {error.strerror}; nothing was changed") from error
    try:
        _take(run, mine)
    finally:
        if mine.exists():
            shutil.rmtree(mine)
    try:
        yield
    finally:
        run.running.rename(mine)
        shutil.rmtree(mine)


def _take(run: RunPaths, mine: Path) -> None:
    deadline = time.monotonic() + GRACE
    while True:
        with suppress(OSError):  # the folder is there and not empty
            mine.rename(run.running)
            return
        held = owner(run)
        if held is None:  # it was given back between the two lines above
            if time.monotonic() > deadline:
                raise InputError(f"{run.running} says nothing of who made it; if nobody executes the run, remove it")
        elif not held.is_alive():
            with suppress(OSError):  # another process has done so before
                run.running.rename(run.root / f".dead-{_token(held)}")
        elif time.monotonic() > deadline or not held.is_here:
            raise InputError(_held_by(run, held))
        else:
            time.sleep(0.1)


def _held_by(run: RunPaths, held: Owner) -> str:
    if held.is_here:
        return f"run '{run.name}' is being executed by process {held.pid}; wait for it, or stop it: kill {held.pid}"
    return (
        f"run '{run.name}' is being executed by process {held.pid} on {held.host}; "
        f"if that process is gone, remove {run.running}"
    )


def _token(process: Owner) -> str:
    return f"{process.host}-{process.pid}-{process.start}"


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _start(pid: int) -> str | None:
    """When a process of this host started, in the kernel's ticks; None: there is none, or only its zombie."""
    if not Path("/proc/self/stat").exists():  # not Linux: its number must do
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return ""
        return ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
