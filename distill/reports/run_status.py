"""How runs stand, from their files alone: state, stages, progress, losses. Reads little, so that lists are quick."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from distill.core.errors import InputError
from distill.exchange import student_card
from distill.exchange.student_card import StudentCard
from distill.runs import claims, events
from distill.runs.run_store import RunPaths, check_spec, event_files, first_event

TAIL = 64 * 1024  # bytes of events that say how a run stands now, at most
PROCESS = ("started", "stopped", "failed", "finished")  # events of a process
DAMAGED = "damaged"


@dataclass(frozen=True)
class StageStatus:
    """One stage: "done", "begun" or "waiting", and how far it is."""

    name: str
    kind: str
    state: str
    done: int | None = None
    total: int | None = None
    unit: str = ""
    per_second: float | None = None
    """units that its process has done in a second"""
    saved_step: int | None = None
    """of the last checkpoint"""
    saved: float | None = None
    """when that was, unix seconds"""
    logs: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far; None where that is not known."""
        if self.state == "done" or self.done is None or self.total is None or not self.per_second:
            return None
        return (self.total - self.done) / self.per_second


@dataclass(frozen=True)
class RunStatus:
    """One run."""

    name: str
    path: str
    state: str
    """running, done, stopped, failed, new or damaged"""
    message: str
    """why it stopped or failed, or what is damaged"""
    created: float | None
    """unix seconds"""
    changed: float | None
    """unix seconds of the last event"""
    stages: list[StageStatus]


def read(run: RunPaths, *, brief: bool = False) -> RunStatus:
    """How a run stands; InputError, naming the file, if it is damaged.

    brief: of progress only that of the first stage that is begun, which a few kilobytes tell.
    """
    check_spec(run)
    try:
        return _read(run, brief=brief)
    except OSError as error:
        raise InputError(f"{run.root} cannot be read: {error.strerror}") from None


def read_all(runs: Iterable[RunPaths]) -> list[RunStatus]:
    """How these runs stand, in brief. A damaged one is in state "damaged", and its message says why."""
    return [_read_any(run) for run in runs]


def damaged(run: RunPaths, error: InputError) -> RunStatus:
    """What is known of a run whose files cannot be read."""
    return RunStatus(run.name, str(run.root), DAMAGED, str(error), None, None, [])


def _read_any(run: RunPaths) -> RunStatus:
    try:
        return read(run, brief=True)
    except InputError as error:
        return damaged(run, error)


@dataclass
class _Seen:
    """The newest events that say how a run stands."""

    process: dict[str, Any] = field(default_factory=dict)
    """the last that began or ended"""
    changed: float | None = None
    progress: dict[str, dict[str, Any]] = field(default_factory=dict)
    """by stage"""
    saves: dict[str, dict[str, Any]] = field(default_factory=dict)


def _read(run: RunPaths, *, brief: bool) -> RunStatus:
    files, first = event_files(run), first_event(run)
    kinds: dict[str, str] = first.get("stages", {}) if first.get("event") == "created" else {}
    states = {name: _state_of(run, name) for name in kinds}
    begun = [name for name, state in states.items() if state == "begun"]
    shown = begun[:1] if brief else list(kinds)  # of which progress is wanted
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
    # A run that has come far since it was started says so before the tail.
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
    if last == "started":  # and nothing after it
        return "stopped", "its process was killed"
    return {"failed": ("failed", message), "created": ("new", "")}.get(last, ("stopped", message))


def _state_of(run: RunPaths, stage: str) -> str:
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
    """The card of every student of a run, by stage; InputError if one is damaged."""
    return {path.parent.name: student_card.read(path.parent) for path in sorted(run.students.glob("*/distill.json"))}


def age(then: float | None) -> str:
    """How long ago, for people."""
    if then is None:
        return ""
    seconds = max(0.0, time.time() - then)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
