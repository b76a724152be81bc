"""The status of runs, from their files: state, stages, progress, losses. Reads little, so that listing is fast."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from distill.core.errors import InputError
from distill.exchange import student_card
from distill.exchange.student_card import StudentCard
from distill.runs import claims, events
from distill.runs.run_store import RunPaths, check_spec, event_files, first_event

TAIL = 64 * 1024  # at most this many bytes of the newest events are read
PROCESS = ("started", "stopped", "failed", "finished")  # kinds of `events.ProcessEvent`
DAMAGED = "damaged"


@dataclass(frozen=True)
class StageStatus:
    """The state of a stage ("done", "begun" or "waiting") and its progress."""

    name: str
    kind: str
    state: str
    done: int | None = None
    total: int | None = None
    unit: str = ""
    per_second: float | None = None
    """units per second of its process"""
    saved_step: int | None = None
    """step of the last checkpoint"""
    saved: float | None = None
    """time of the last checkpoint, unix seconds"""
    logs: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float | None:
        """Remaining seconds at the current rate; None if unknown."""
        if self.state == "done" or self.done is None or self.total is None or not self.per_second:
            return None
        return (self.total - self.done) / self.per_second


@dataclass(frozen=True)
class RunStatus:
    """The status of a run."""

    name: str
    path: str
    state: str
    """running, done, stopped, failed, new or damaged"""
    message: str
    """why it stopped or failed, or what is damaged"""
    created: float | None
    """time of creation, unix seconds"""
    changed: float | None
    """time of the last event, unix seconds"""
    stages: list[StageStatus]


def read(run: RunPaths, *, brief: bool = False) -> RunStatus:
    """The status of a run. Raises InputError, with the name of the file, if the run is damaged.

    brief: read the progress of the first begun stage only, which needs a few kilobytes.
    """
    check_spec(run)
    try:
        return _read(run, brief=brief)
    except OSError as error:
        raise InputError(f"{run.root} cannot be read: {error.strerror}") from None


def read_all(runs: Iterable[RunPaths]) -> list[RunStatus]:
    """The brief status of these runs. A damaged run has the state "damaged" and a message with the reason."""
    return [_read_any(run) for run in runs]


def damaged(run: RunPaths, error: InputError) -> RunStatus:
    """The status of a run whose files cannot be read."""
    return RunStatus(run.name, str(run.root), DAMAGED, str(error), None, None, [])


def _read_any(run: RunPaths) -> RunStatus:
    try:
        return read(run, brief=True)
    except InputError as error:
        return damaged(run, error)


@dataclass
class _Seen:
    """The newest events that determine the status of a run."""

    process: dict[str, Any] = field(default_factory=dict)
    """the last event of a process that began or ended"""
    changed: float | None = None
    progress: dict[str, dict[str, Any]] = field(default_factory=dict)
    """stage -> its last progress event"""
    saves: dict[str, dict[str, Any]] = field(default_factory=dict)


def _read(run: RunPaths, *, brief: bool) -> RunStatus:
    files, first = event_files(run), first_event(run)
    kinds: dict[str, str] = first.get("stages", {}) if first.get("event") == "created" else {}
    states = {name: stage_state(run, name) for name in kinds}
    begun = [name for name, state in states.items() if state == "begun"]
    shown = begun[:1] if brief else list(kinds)  # stages whose progress is read
    wanted = {(kind, name) for kind in (["progress"] if brief else ["progress", "saved"]) for name in shown}
    unknown = {name for name, state in states.items() if state != "done"}
    seen = _Seen()
    for event in events.backwards(files, TAIL):
        kind = event["event"]
        seen.changed = event["time"] if seen.changed is None else seen.changed
        if kind in PROCESS:
            seen.process = seen.process or event
        elif (kind, event.get("label")) in wanted:
            seen.progress[event["label"]] = event
            wanted.remove((kind, event["label"]))
        elif (kind, event.get("stage")) in wanted:
            seen.saves[event["stage"]] = event
            wanted.remove((kind, event["stage"]))
        if not wanted and (seen.process or (kinds and not unknown)):
            break
    # In a run with many events, the "started" event may be before the part that was read.
    before = "started" if sum(path.stat().st_size for path in files) > TAIL else "created"
    stages = [
        _stage(name, kind, states[name], seen.progress.get(name, {}), seen.saves.get(name, {}))
        for name, kind in kinds.items()
    ]
    state, message = _state(run, stages, seen.process.get("event", before), seen.process.get("message", ""))
    return RunStatus(run.name, str(run.root), state, message, first.get("time"), seen.changed, stages)


def _state(run: RunPaths, stages: list[StageStatus], last: str, message: str) -> tuple[str, str]:
    if (held := claims.executing(run)) is not None:
        return "running", f"process {held.pid} on {held.host}"
    if stages and all(stage.state == "done" for stage in stages):
        return "done", ""
    if last == "started":  # no event says how that process ended
        return "stopped", "its process was killed"
    return {"failed": ("failed", message), "created": ("new", "")}.get(last, ("stopped", message))


def stage_state(run: RunPaths, stage: str) -> str:
    """The state of a stage: done, begun or waiting."""
    paths = run.stage(stage)
    return "done" if paths.done.exists() else "begun" if paths.root.exists() else "waiting"


def _stage(name: str, kind: str, state: str, progress: dict[str, Any], save: dict[str, Any]) -> StageStatus:
    return StageStatus(
        name,
        kind,
        state,
        progress.get("done"),
        progress.get("total"),
        progress.get("unit", ""),
        progress.get("per_second"),
        save.get("step"),
        save.get("time"),
        progress.get("logs", {}),
    )


def students(run: RunPaths) -> dict[str, StudentCard]:
    """Stage -> card of its student. InputError if a card is damaged."""
    return {path.parent.name: student_card.read(path.parent) for path in sorted(run.students.glob("*/distill.json"))}


def age(then: float | None) -> str:
    """How long ago a time was, like "3 h ago"; "" for None. then: unix seconds."""
    if then is None:
        return ""
    seconds = max(0.0, time.time() - then)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
