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


def shortage(folder: Path, need: int) -> str:
    """What is missing for `need` bytes below `folder`; empty: nothing."""
    left = free(folder)
    return f"{human(need)} needed, but {human(left)} are free for {folder}" if need > left else ""


def require(folder: Path, need: int, what: str) -> None:
    """RunError unless `need` bytes can be written below `folder`."""
    if missing := shortage(folder, need):
        raise RunError(
            f"no room for {what}: {missing}; make some (`distill clean RUN` says what a run no longer needs), "
            "or use another store"
        )
