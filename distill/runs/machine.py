"""What a run was made with, read from its env.json: versions, machine, threads. `launch.environment` records it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from distill.core import records, versions
from distill.core.field_types import Line
from distill.runs.run_store import RunPaths


class Git(BaseModel):
    """The checkout that the package was imported from."""

    model_config = ConfigDict(frozen=True)

    commit: Line
    changed: bool = False


class Machine(BaseModel):
    """The content of env.json, as far as anything reads it; a record of an older version may lack some."""

    model_config = ConfigDict(frozen=True)

    distill: Line | None = None
    draws: int = 1
    """version of the random numbers of training, see `versions`"""
    git: Git | None = None
    python: Line | None = None
    platform: Line | None = None
    cpu: Line = "an unknown CPU"
    cpus: int | None = None
    """that its processes might use"""
    threads: Annotated[int, Field(gt=0)] | None = None
    """of a process, where the spec names none"""
    packages: Annotated[dict[Line, Line | None], Field(max_length=10_000)] = {}
    """version by name"""

    def version(self, package: str) -> str | None:
        """Of an installed package, whatever the case of its name; None: not installed, or not recorded."""
        return {name.lower(): version for name, version in self.packages.items()}.get(package)


MACHINE: records.Schema[Machine] = records.Schema(Machine)


def load(run: RunPaths) -> Machine:
    """What a run was made with; InputError if its env.json is damaged. Nothing is known where there is none."""
    try:
        return records.load(run.env, MACHINE, "delete that file: the run works without it")
    except FileNotFoundError:
        return Machine(draws=versions.DRAWS)  # checkpoints say theirs
