"""Copies the package into a run, so that later edits do not change queued jobs."""

from pathlib import Path

from distill.core.atomic import new_folder, write_files
from distill.launch import environment

PACKAGES = ("distill", "recipes", "slurm")


def files(root: Path = environment.ROOT) -> dict[str, bytes]:
    """Path relative to `root` -> content, for all files of the package. root: the folder for PYTHONPATH."""
    found = (path for package in PACKAGES for path in sorted((root / package).rglob("*")))
    wanted = (path for path in found if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in wanted}


def write(folder: Path) -> None:
    """Copy the package into a new folder, atomically."""
    with new_folder(folder) as new:
        write_files(new, files())
