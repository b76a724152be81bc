"""Free space on disk and in memory.

A disk quota is respected if the file system reports it as free space. A memory limit is respected if a cgroup sets it.
"""

import os
import re
from pathlib import Path

from distill.core.errors import RunError


def human(count: int | float) -> str:
    """A number of bytes as text, like "1.5 GB" (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def free(folder: Path) -> int:
    """Free bytes for this user on the disk of `folder`. If it does not exist, its nearest existing parent is used."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    disk = os.statvfs(existing)
    return disk.f_bavail * disk.f_frsize


def memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process may still allocate; None if unknown.

    The minimum over the host and the cgroups of the process (Slurm and containers set these limits). Memory used by
    file caches counts as free. root: the folder that contains proc and sys.
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
        while folder.is_relative_to(base):  # a parent group may have a lower limit
            limits, usage = _text(folder / limit).strip(), _text(folder / used).strip()
            if limits.isdecimal() and usage.isdecimal():
                found.append(int(limits) - int(usage) + _numbers(folder / "memory.stat").get("inactive_file", 0))
            folder = folder.parent
    return max(0, min(found)) if found else None


def _numbers(path: Path) -> dict[str, int]:
    """Name -> number, of a file with lines NAME NUMBER or NAME: NUMBER."""
    return {name: int(number) for name, number in re.findall(r"^(\w+):?\s+(\d+)", _text(path), re.MULTILINE)}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def shortage(folder: Path, need: int) -> str:
    """A text that says how much space is missing to write `need` bytes in `folder`; empty if there is enough."""
    left = free(folder)
    return f"{human(need)} needed, but only {human(left)} free in {folder}" if need > left else ""


def require(folder: Path, need: int, what: str) -> None:
    """Raise RunError unless `need` bytes are free for `folder`."""
    if missing := shortage(folder, need):
        raise RunError(
            f"not enough disk space for {what}: {missing}; free some space (`distill clean RUN` lists what a run no "
            "longer needs), or use another store"
        )
