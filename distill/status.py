"""How runs stand, from their files alone: state, stages, progress, losses. Reads little, so that lists are quick."""

import time
from dataclasses import dataclass, field
from typing import Any

from distill import claims
from distill.store import RunPaths, read_events, read_json

TAIL = 64 * 1024  # bytes of events that say how a run stands now


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
    """running, done, stopped, failed or new"""
    message: str
    """why it stopped or failed"""
    created: float | None
    """unix seconds"""
    changed: float | None
    """unix seconds of the last event"""
    stages: list[StageStatus]


def read(run: RunPaths) -> RunStatus:
    """How a run stands."""
    first = next(read_events(run), {})
    kinds: dict[str, str] = first.get("stages", {})
    last: dict[str, Any] = {}
    message, changed = "", None
    progress: dict[str, dict[str, Any]] = {}
    saves: dict[str, dict[str, Any]] = {}
    for event in read_events(run, TAIL):
        changed = event.get("time", changed)
        if event.get("event") in ("started", "stopped", "failed", "finished"):
            last, message = event, str(event.get("message", ""))
        elif event.get("event") == "progress":
            progress[str(event.get("label"))] = event
        elif event.get("event") == "saved":
            saves[str(event.get("stage"))] = event
    stages = [_stage(run, name, kind, progress.get(name, {}), saves.get(name, {})) for name, kind in kinds.items()]
    # A run that has come far since it was started says so before the tail.
    unknown = "started" if run.events.exists() and run.events.stat().st_size > TAIL else "created"
    state, message = _state(run, stages, str(last.get("event", unknown)), message)
    return RunStatus(run.name, str(run.root), state, message, first.get("time"), changed, stages)


def _state(run: RunPaths, stages: list[StageStatus], last: str, message: str) -> tuple[str, str]:
    if (held := claims.executing(run)) is not None:
        return "running", f"process {held.pid} on {held.host}"
    if stages and all(stage.state == "done" for stage in stages):
        return "done", ""
    if last == "started":  # and nothing after it
        return "stopped", "its process was killed"
    return {"failed": ("failed", message), "created": ("new", "")}.get(last, ("stopped", message))


def _stage(run: RunPaths, name: str, kind: str, progress: dict[str, Any], save: dict[str, Any]) -> StageStatus:
    paths = run.stage(name)
    return StageStatus(
        name,
        kind,
        "done" if paths.done.exists() else "begun" if paths.root.exists() else "waiting",
        progress.get("done"),
        progress.get("total"),
        str(progress.get("unit", "")),
        float(progress["per_second"]) if "per_second" in progress else None,
        save.get("step"),
        save.get("time"),
        progress.get("logs", {}),
    )


def students(run: RunPaths) -> dict[str, dict[str, Any]]:
    """distill.json of every student of a run, by stage."""
    cards = sorted(run.students.glob("*/distill.json"))
    return {path.parent.name: read_json(path) for path in cards}


def age(then: float | None) -> str:
    """How long ago, for people."""
    if then is None:
        return ""
    seconds = max(0.0, time.time() - then)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
