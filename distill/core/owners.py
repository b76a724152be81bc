"""Processes that own a file or a folder, by its record or its name: distinguished from later ones with the same number.

A process number means something only on one machine and there only in one pid namespace: containers on one machine,
which may have the same host name, count their processes separately. Whether a process of another namespace or machine
is alive cannot be looked up.
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
"""The record may have been written by anybody: nothing in it is a path."""


@dataclass(frozen=True)
class Owner:
    """A process, told apart from later ones with the same number by its start time and the machine's boot."""

    host: Word
    boot: Word
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    start: Word
    job: Word = ""
    """of the cluster, that the process belongs to"""
    restart: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """how often that job had been started before"""
    namespace: Word = ""
    """in which its number counts; "": the system has none, or the record is of an earlier version"""

    @classmethod
    def this(cls, job: str = "", restart: int = 0) -> "Owner":
        return cls(platform.node(), _boot(), os.getpid(), _own_start(), job, restart, _namespace())

    @property
    def is_here(self) -> bool:
        """Whether this process can look its number up."""
        if not self.namespace:
            return self.host == platform.node()
        on_this_machine = self.host == platform.node() or self.is_of_this_boot
        return on_this_machine and self.namespace == _namespace() and self.namespace.endswith("]")

    @property
    def is_of_this_boot(self) -> bool:
        """Whether it was started since this very machine was."""
        return self.boot == _boot()

    @property
    def label(self) -> str:
        """In one word, for the names of folders that are its own."""
        return ",".join([str(self.pid), self.start, self.boot, *filter(None, [self.namespace]), self.host])

    @classmethod
    def of_label(cls, label: str) -> "Owner | None":
        """None: this is no label."""
        pid, *others = label.split(",")
        number = whole_number(pid)
        if number is None or len(others) not in (3, 4) or not others[-1]:  # an earlier version wrote no namespace
            return None
        return cls(others[-1], others[1], number, others[0], namespace=others[2] if len(others) == 4 else "")

    @property
    def token(self) -> str:
        """A name that only this process has, and that leads nowhere, whatever its record says."""
        told = [self.host, self.pid, self.boot, self.start, self.namespace]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]

    def is_alive(self) -> bool:
        """False once it is known to be gone; a process that cannot be looked up counts as alive."""
        return not self.is_here or (self.is_of_this_boot and _start(self.pid) == self.start)


def _namespace() -> str:
    """In which the numbers of processes count, like "pid:[4026531836]".

    Where /proc was mounted in another one, no number can be looked up: then our number there is added.
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
        fields = _fields(str(pid))
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _fields(process: str) -> list[str]:
    """What the kernel tells of a process, after its name."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
