"""Passes the events of a run on to a tracker, such as TensorBoard. The run itself takes no part in this.

Everything is passed on from the beginning each time, and replaces what was passed on before. So the result depends on
the run alone, however often and whenever it is tracked.
"""

import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from distill.core.errors import InputError, RunError
from distill.core.printing import warn
from distill.core.text import one_line
from distill.runs import claims, events, results, todo
from distill.runs.results import Results, Row
from distill.runs.run_store import RunPaths, event_files, first_event
from distill.trackers import TrackedMoment, TrackedRun, Tracker, find_tracker

MAX_PICTURES = 64 * 2**20  # bytes of the pictures of one evaluation

DrawSamples = Callable[[str, int], tuple[int, bytes] | None]
"""(stage, step of a checkpoint) -> (images that it was trained with, picture of its samples); None: it is gone"""


@dataclass(frozen=True)
class Tracking:
    """Context manager: an error of a tracker becomes a RunError that names the tracker, and the line that failed."""

    name: str
    run: RunPaths

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Exception | SystemExit) and not isinstance(error, InputError | RunError):
            last = traceback.extract_tb(at)[-1]
            raise RunError(
                f"the tracker '{self.name}' failed: {last.filename}, line {last.lineno}: {type(error).__name__}: "
                f"{one_line(str(error), 500)}; the run is not affected. To pass everything on again: "
                f"distill track {self.run.root} --to {self.name}"
            ) from error


class Feed:
    """Passes events of a run on to a tracker, in the order in which they were written.

    draw: draws samples of each checkpoint; None: no samples.
    """

    def __init__(self, run: RunPaths, tracker: Tracker, draw: DrawSamples | None) -> None:
        self._run, self._tracker, self._draw = run, tracker, draw
        self._unread = events.Unread()
        self._kinds: dict[str, str] = {}  # of each stage
        self._last: dict[str, TrackedMoment] = {}  # the last progress of each stage
        self._measured: set[str] = set()  # stages whose results were passed on

    def more(self) -> int:
        """Pass on what is new, and return the number of events."""
        count = 0
        for event in self._unread.read(event_files(self._run)):
            self._pass(event)
            count += 1
        if count:
            self._tracker.flush()
        return count

    def _pass(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "created":
                self._kinds.update(event.get("stages", {}))
            case "progress" if event["label"] in self._kinds:
                self._progress(event)
            case "stage started":
                stage = event["stage"]
                self._kinds.setdefault(stage, event.get("kind", ""))
                where = f" on {event['device']}" if event.get("device") else ""
                self._tracker.note(self._now(stage, event["time"]), f"started{where}")
            case "stage done":
                self._tracker.note(self._now(event["stage"], event["time"]), "done")
                self._results(event["stage"], event["time"])
            case "warning" if event["label"] in self._kinds:
                self._tracker.note(self._now(event["label"], event["time"]), f"warning: {event['text']}")
            case "saved" if self._draw is not None:
                self._samples(self._draw, event["stage"], event["step"], event["time"])

    def _now(self, stage: str, time: float) -> TrackedMoment:
        """The moment of an event that does not say how much is done."""
        return replace(self._last.get(stage, TrackedMoment(stage, "images", 0, time)), time=time)

    def _progress(self, event: dict[str, Any]) -> None:
        stage, unit = event["label"], event.get("unit", "images")
        at = TrackedMoment(stage, unit, event["done"], event["time"])
        last = self._last.get(stage)
        if last is not None and at.done <= last.done:  # a resumed run repeats what followed its checkpoint
            self._tracker.rewind(at)
        self._last[stage] = at
        rates = {f"{unit} per second": event.get("per_second"), "waiting": event.get("waiting")}
        known = {name: value for name, value in rates.items() if value is not None}
        self._tracker.metrics(at, {**known, **event.get("logs", {})})

    def _results(self, stage: str, time: float) -> None:
        """The rows of an evaluation, each at its number of network calls, and their pictures."""
        found = None if stage in self._measured else results.load_results(self._run.stage(stage))
        if found is None:
            return
        self._measured.add(stage)
        shown, room = set(), MAX_PICTURES
        for row in found.rows:
            at = TrackedMoment(stage, "network calls", row.nfe, time)
            self._tracker.metrics(at, {f"{row.label}/{name}": value for name, value in _measured(found, row).items()})
            png = None if row.picture in shown else results.picture(self._run.stage(stage).root, row.picture, room)
            if png:  # neither deleted nor too large
                self._tracker.picture(at, row.label, png)
                shown.add(row.picture)
                room -= len(png)

    def _samples(self, draw: DrawSamples, stage: str, step: int, time: float) -> None:
        try:
            drawn = draw(stage, step)
        except (InputError, RunError) as error:
            warn(f"no samples of stage '{stage}' from here on: {error}")
            self._draw = _without(draw, stage)
            return
        if drawn is not None:
            images, png = drawn
            self._tracker.picture(TrackedMoment(stage, "images", images, time), "samples", png)


def _measured(found: Results, row: Row) -> dict[str, float]:
    """The numbers of a row by name."""
    numbers = {found.distance or "": row.distance, "KID": row.kid, "precision": row.precision, "recall": row.recall}
    numbers |= {**row.metrics, "rms": row.rms, "images per second": row.images_per_second}
    return {name: value for name, value in numbers.items() if value is not None}


def _without(draw: DrawSamples, refused: str) -> DrawSamples:
    """Draws no samples of one stage."""
    return lambda stage, step: None if stage == refused else draw(stage, step)


@contextmanager
def opened(run: RunPaths, name: str, draw: DrawSamples | None = None) -> Iterator[Feed]:
    """Start a tracker for a run, with an empty folder, and close it at the end.

    InputError if there is no such tracker, or if another process is tracking the run with it. RunError if it fails.
    """
    module = find_tracker(name)
    spec = todo.load_spec(run).model_dump(mode="json")
    key = sha256(f"{run.name} {first_event(run)}".encode()).hexdigest()[:16]
    with _claimed(run, name) as folder, Tracking(name, run):
        tracker = module.start(TrackedRun(run.name, key, folder, spec))
        try:
            yield Feed(run, tracker, draw)
        finally:
            tracker.close()


@contextmanager
def _claimed(run: RunPaths, name: str) -> Iterator[Path]:
    """The empty folder of a tracker, which no other process uses at the same time."""
    folder = run.tracking(name)
    lock = RunPaths(folder.with_name(f".{name}"))
    if (other := claims.executing(lock)) is not None:
        raise InputError(
            f"process {other.pid} on {other.host} is tracking run '{run.name}' with {name} already; wait for it, or "
            "stop it"
        )
    with claims.claim(lock):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        yield folder
