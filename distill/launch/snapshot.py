"""The package as files of a run: what is edited after a job was queued does not change the job."""

from pathlib import Path

from distill.core.atomic import new_folder, write_files
from distill.launch import environment

PACKAGES = ("distill", "recipes", "slurm")


def files(root: Path = environment.ROOT) -> dict[str, bytes]:
    """Every file of the package, by its name below the folder that goes into PYTHONPATH."""
    found = (path for package in PACKAGES for path in sorted((root / package).rglob("*")))
    wanted = (path for path in found if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in wanted}


def write(folder: Path) -> None:
    """The package in a folder of its own, all of it or nothing."""
    with new_folder(folder) as new:
        write_files(new, files())
