"""Room for what is about to be written. Quotas count where the file system tells them as free space."""

import os
from pathlib import Path

from distill.guard import RunError


def human(count: int | float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def free(folder: Path) -> int:
    """Bytes that this user may still write to the disk of `folder`, or of the nearest folder above it that exists."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    disk = os.statvfs(existing)
    return disk.f_bavail * disk.f_frsize


def require(folder: Path, need: int, what: str) -> None:
    """RunError unless `need` bytes can be written below `folder`. what: "40 pairs", as in "40 pairs need 1 MB"."""
    if need > (left := free(folder)):
        raise RunError(
            f"{what} need {human(need)}, but {human(left)} are free for {folder}; "
            "make room (`distill clean RUN` says what a run no longer needs), or use another store"
        )
