"""Where things lie. A run is a directory; state appears complete (write, fsync, rename) or not at all."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.guard import RunError


def sync_dir(path: Path) -> None:
    """Make renames within `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` so that `path` holds either the old or the new whole, whatever happens."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror}; nothing was changed") from error
    sync_dir(path.parent)


def write_json(path: Path, content: Any) -> None:  # noqa: ANN401  (anything json takes)
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(content, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Parsed JSON of a file that must exist."""
    return json.loads(path.read_text())


@dataclass(frozen=True)
class StagePaths:
    """The files of one stage of a run."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def pairs(self) -> Path:
        return self.root / "pairs"

    @property
    def done(self) -> Path:
        """JSON with the stage's result; exists only once the stage is complete."""
        return self.root / "done.json"


@dataclass(frozen=True)
class RunPaths:
    """The files of one run; the only place that knows their names."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def spec(self) -> Path:
        return self.root / "spec.yaml"

    @property
    def env(self) -> Path:
        return self.root / "env.json"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def stage(self, name: str) -> StagePaths:
        return StagePaths(self.root / "stages" / name)

    def student(self, stage: str) -> Path:
        """The student exported by a train stage."""
        return self.root / "students" / stage


def append_event(run: RunPaths, event: str, **fields: Any) -> None:  # noqa: ANN401
    """One flushed JSON line in the run's events: {"time": unix seconds, "event": event, ...}."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
    try:
        with run.events.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise RunError(f"cannot write {run.events}: {error.strerror}") from error


def read_events(run: RunPaths) -> Iterator[dict[str, Any]]:
    """The run's events, oldest first; a line cut short by a kill is passed over."""
    if not run.events.exists():
        return
    for line in run.events.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
