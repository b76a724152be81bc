"""Processes that own a folder, by its record or its name: told apart from later ones with the same number."""

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from distill.fieldtypes import Line
from distill.guard import whole_number


def _is_word(text: str) -> str:
    if "/" in text:
        raise ValueError("must be without '/'")
    return text


Word = Annotated[Line, AfterValidator(_is_word)]
"""The record may have been written by anybody: nothing in it is a path."""


@dataclass(frozen=True)
class Owner:
    """A process, told apart from later ones with the same number by its start time and the host's boot."""

    host: Word
    boot: Word
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    start: Word
    job: Word = ""
    """of the cluster, that the process belongs to"""
    restart: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """how often that job had been started before"""

    @classmethod
    def this(cls, job: str = "", restart: int = 0) -> "Owner":
        return cls(platform.node(), _boot(), os.getpid(), _start(os.getpid()) or "", job, restart)

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
        number = whole_number(pid)
        return cls(host, boot, number, start) if number is not None and host else None

    def is_alive(self) -> bool:
        """False once it is known to be gone; a process on another host counts as alive."""
        if not self.is_here:
            return True
        return self.boot == _boot() and _start(self.pid) == self.start


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
