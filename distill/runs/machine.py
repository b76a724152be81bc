"""The environment in which a run was created, read from its env.json. `launch.environment` writes that file."""

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
    """The fields of env.json that are used. Files of older versions may lack some."""

    model_config = ConfigDict(frozen=True)

    distill: Line | None = None
    draws: int = 1
    """version of the random numbers in training, see `core.versions`"""
    git: Git | None = None
    python: Line | None = None
    platform: Line | None = None
    cpu: Line = "an unknown CPU"
    cpus: int | None = None
    """number of CPUs that its processes may use"""
    threads: Annotated[int, Field(gt=0)] | None = None
    """threads of a process if the spec does not set them"""
    packages: Annotated[dict[Line, Line | None], Field(max_length=10_000)] = {}
    """installed packages: name -> version"""

    @property
    def commit(self) -> str | None:
        """Short commit of distill's source code, and whether files had changed since; None if it is not known."""
        return None if self.git is None else f"{self.git.commit[:12]}{' (with changes)' if self.git.changed else ''}"

    def version(self, package: str) -> str | None:
        """Version of a package; None if it is not installed or not recorded. package: its name in lower case."""
        return {name.lower(): version for name, version in self.packages.items()}.get(package)


MACHINE: records.Schema[Machine] = records.Schema(Machine)


def load(run: RunPaths) -> Machine:
    """Read a run's env.json. If there is none, all fields are unknown. InputError if it is damaged."""
    try:
        return records.load(run.env, MACHINE, "delete this file; the run does not need it")
    except FileNotFoundError:
        return Machine(draws=versions.DRAWS)  # checkpoints record the version too
