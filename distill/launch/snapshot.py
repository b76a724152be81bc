"""The package as files of a run: what is edited after a job was queued does not change the job."""

import os
import shutil
from pathlib import Path

from distill.launch import environment

PACKAGES = ("distill", "recipes", "slurm")


def files(root: Path = environment.ROOT) -> dict[str, bytes]:
    """Every file of the package, by its name below the folder that goes into PYTHONPATH."""
    found = (path for package in PACKAGES for path in sorted((root / package).rglob("*")))
    wanted = (path for path in found if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in wanted}


def write(folder: Path) -> None:
    """The package in a folder of its own, all of it or nothing."""
    temporary = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    try:
        for name, content in files().items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
        temporary.rename(folder)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
