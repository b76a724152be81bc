"""The process that owns a file or a folder, identified so that no later process with the same pid is mistaken for it.

The owner is stored in a record, or in the name of the file. A pid is valid only on one machine, and there only in one
pid namespace: containers on one machine, which may share a host name, number their processes separately. Whether a
process of another namespace or machine is alive cannot be looked up.
"""

import hashlib
import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from distill.core.field_types import Line
from distill.core.text import whole_number


def _is_word(text: str) -> str:
    if "/" in text:
        raise ValueError("must be without '/'")
    return text


Word = Annotated[Line, AfterValidator(_is_word)]
"""One line of text without '/': a record may come from anyone, so its fields must not be usable as paths."""


@dataclass(frozen=True)
class Owner:
    """A process. The start time and the machine's boot id distinguish it from later processes with the same pid."""

    host: Word
    boot: Word
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    start: Word
    job: Word = ""
    """the cluster job of the process; "": none"""
    restart: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """how many times that job had been started before"""
    namespace: Word = ""
    """pid namespace; "": the system has none, or the record was written by an earlier version"""

    @classmethod
    def this(cls, job: str = "", restart: int = 0) -> "Owner":
        return cls(platform.node(), _boot(), os.getpid(), _own_start(), job, restart, _namespace())

    @property
    def is_here(self) -> bool:
        """Whether this process can look up the owner's pid: same machine, same pid namespace."""
        if not self.namespace:
            return self.host == platform.node()
        on_this_machine = self.host == platform.node() or self.is_of_this_boot
        return on_this_machine and self.namespace == _namespace() and self.namespace.endswith("]")

    @property
    def is_of_this_boot(self) -> bool:
        """Whether it was started on this machine, since its last boot."""
        return self.boot == _boot()

    @property
    def label(self) -> str:
        """The owner as one word, for the names of its folders; see `of_label`."""
        return ",".join([str(self.pid), self.start, self.boot, *filter(None, [self.namespace]), self.host])

    @classmethod
    def of_label(cls, label: str) -> "Owner | None":
        """The owner that a label describes; None if the text is not a label."""
        pid, *others = label.split(",")
        number = whole_number(pid)
        if number is None or len(others) not in (3, 4) or not others[-1]:  # an earlier version wrote no namespace
            return None
        return cls(others[-1], others[1], number, others[0], namespace=others[2] if len(others) == 4 else "")

    @property
    def token(self) -> str:
        """A name unique to this process. It is a hash, so it is a safe file name whatever the record contains."""
        told = [self.host, self.pid, self.boot, self.start, self.namespace]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]

    def is_alive(self) -> bool:
        """False if the process is known to have ended. A process that cannot be looked up counts as alive."""
        return not self.is_here or (self.is_of_this_boot and _start(self.pid) == self.start)


def _namespace() -> str:
    """The pid namespace of this process, like "pid:[4026531836]"; "" if the system has none.

    If /proc belongs to another namespace, pids cannot be looked up. The pid of this process in /proc is then appended.
    """
    with suppress(OSError):
        number, namespace = Path("/proc/self").readlink(), str(Path("/proc/self/ns/pid").readlink())
        return namespace if number == Path(str(os.getpid())) else f"{namespace}:{number}"
    return ""


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _own_start() -> str:
    with suppress(OSError):
        return _fields("self")[19]
    return ""


def _start(pid: int) -> str | None:
    """Start time of a process of this host, in clock ticks since boot; None if there is none, or it is a zombie.

    Without /proc (not Linux), "" for a process that exists.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return ""
        return ""
    try:
        fields = _fields(str(pid))
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _fields(process: str) -> list[str]:
    """The fields of /proc/PID/stat that follow the process name."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
