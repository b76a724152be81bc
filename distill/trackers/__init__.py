"""Trackers, one per file: they show the numbers of a run elsewhere, as in TensorBoard. Installed packages can add more.

A tracker never runs in a training process. `distill track` reads the events of a run and passes them on to a tracker.
So a tracker that fails or hangs cannot stop a run. It is a module: a file here, or an entry point of the group
`distill.trackers`, with the name that `distill track --to NAME` uses. A tracker module contains:

    start(run)      returns the `Tracker` of a run; `run` is a `TrackedRun`
    VIEW = "..."    how to look at what was written, in one line; {folder} stands for the tracker's folder

Everything is passed on again each time, from the beginning of the run. `start` must therefore replace what was passed
on before: in an empty folder this happens by itself; a service must find the earlier record by the key of the run.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from distill.core.errors import InputError
from distill.core.field_types import NAME, Line
from distill.core.plugins import Plugins, takes
from distill.core.text import short, suggest

PLUGINS = Plugins(__name__, "tracker", "install it with: pip install 'distill[{name}]'")


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about its run at the beginning."""

    name: str
    key: str
    """letters and digits that no other run has, and that are the same each time that this run is tracked"""
    folder: Path
    """an empty folder for the files of the tracker"""
    spec: Mapping[str, Any]
    """the spec of the run, as JSON values"""


@dataclass(frozen=True)
class TrackedMoment:
    """When something happened in a run."""

    stage: str
    """a name of letters, digits and . _ -"""
    unit: str
    """what is counted: images, pairs, samples; for results of an evaluation: network calls"""
    done: int
    """how many of them were done"""
    time: float
    """unix seconds"""


@runtime_checkable
class Tracker(Protocol):
    """Takes what happens in one run, in the order in which it happened."""

    def metrics(self, at: TrackedMoment, values: Mapping[str, float]) -> None:
        """Named numbers. They may be infinite or NaN."""

    def rewind(self, at: TrackedMoment) -> None:
        """The stage goes back, as when it is resumed: its earlier numbers at `at.done` and after it are obsolete."""

    def note(self, at: TrackedMoment, text: str) -> None:
        """A stage began or ended, or a warning. The text may contain anything."""

    def picture(self, at: TrackedMoment, name: str, png: bytes) -> None:
        """A picture, as the content of a PNG file."""

    def flush(self) -> None:
        """Make everything so far visible."""

    def close(self) -> None:
        """The end. Called once, also after an error."""


class TrackerModule(BaseModel):
    """The contents of a tracker module, validated."""

    model_config = ConfigDict(frozen=True, strict=True)

    start: Callable[[TrackedRun], Tracker]
    view: Line = Field(alias="VIEW")


def tracker_names() -> list[str]:
    """The names of all available trackers. Does not import them."""
    return [*PLUGINS.ours(), *(name for name in PLUGINS.others() if NAME.fullmatch(name))]


def find_tracker(name: str) -> TrackerModule:
    """Returns the tracker called `name`. InputError if there is none, if it is invalid, or if a package is missing."""
    if name not in tracker_names():
        raise InputError(f"unknown tracker '{short(name)}': {suggest(name, tracker_names())}")
    return _read(name, tuple(sys.path))


@functools.cache
def _read(name: str, path: tuple[str, ...]) -> TrackerModule:
    plugin = PLUGINS.load(name)
    module = plugin.read(TrackerModule)
    if not takes(module.start, ["run"]):
        plugin.refuse(["start must take (run)"])
    return module
