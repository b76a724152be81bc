"""Space for what is about to be written, on a disk or in memory.

Quotas of a disk count where the file system tells them as free space; limits of memory, where a cgroup sets them.
"""

import os
import re
from pathlib import Path

from distill.core.errors import RunError


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


def memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process may still take: of this host, or of its cgroup (as Slurm and containers set).

    What caches hold counts as free. None: the system does not say. root: below which /proc and /sys lie.
    """
    host = _numbers(root / "proc/meminfo")
    found = [1024 * host["MemAvailable"]] if "MemAvailable" in host else []
    groups = _text(root / "proc/self/cgroup")
    unified = re.search(r"^0::/(.*)$", groups, re.MULTILINE)
    v1 = re.search(r"^\d+:(?:\S+,)?memory(?:,\S+)?:/(.*)$", groups, re.MULTILINE)
    for match, base, limit, used in (
        (unified, root / "sys/fs/cgroup", "memory.max", "memory.current"),
        (v1, root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        folder = base / match[1] if match else root
        while folder.is_relative_to(base):  # a group above may have a lower limit
            limits, usage = _text(folder / limit).strip(), _text(folder / used).strip()
            if limits.isdecimal() and usage.isdecimal():
                found.append(int(limits) - int(usage) + _numbers(folder / "memory.stat").get("inactive_file", 0))
            folder = folder.parent
    return max(0, min(found)) if found else None


def _numbers(path: Path) -> dict[str, int]:
    """Of a file of lines NAME NUMBER."""
    return {name: int(number) for name, number in re.findall(r"^(\w+):?\s+(\d+)", _text(path), re.MULTILINE)}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def shortage(folder: Path, need: int) -> str:
    """What is missing for `need` bytes below `folder`; empty: nothing."""
    left = free(folder)
    return f"{human(need)} needed, but {human(left)} are free for {folder}" if need > left else ""


def require(folder: Path, need: int, what: str) -> None:
    """RunError unless `need` bytes can be written below `folder`."""
    if missing := shortage(folder, need):
        raise RunError(
            f"not enough disk space for {what}: {missing}; free some (`distill clean RUN` lists what a run no longer "
            "needs), "
            "or use another store"
        )
