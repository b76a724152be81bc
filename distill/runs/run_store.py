"""The files of a run and of a store. A run is a folder; its state files are written atomically (fsync, rename)."""

import errno
import json
import os
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.core import lease, records
from distill.core.atomic import clear_up, new_folder, write_files
from distill.core.errors import InputError, RunError
from distill.core.field_types import NAME
from distill.core.owners import Owner
from distill.core.text import one_line, short, suggest
from distill.runs import events

RESERVED = {
    "baselines": "measured rows of teachers",
    "caches": "cached latents and prompts",
    "emoji-teacher": "the emoji teacher",
    "fitted": "fitted solvers",
    "indexes": "image indexes",
    "inputs": "files fetched from the hub",
    "registry": "published students",
    "schedules": "step times",
}
CREATED = "events/created.jsonl"  # in the folder of a run: its first event, written when the run is created


@dataclass(frozen=True)
class StagePaths:
    """The files of one stage of a run."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def snapshots(self) -> Path:
        return self.root / "snapshots"

    @property
    def pairs(self) -> Path:
        return self.root / "pairs"

    @property
    def caches(self) -> Path:
        """JSON that lists the caches of a cache stage, which are in the store (see `cached`)."""
        return self.root / "caches.json"

    @property
    def times(self) -> Path:
        """JSON with the times of the states of a train stage's pairs, kept because the pairs may be deleted."""
        return self.root / "times.json"

    @property
    def micro_batch(self) -> Path:
        """JSON with the micro-batch that was chosen for launch.micro_batch=auto."""
        return self.root / "micro_batch.json"

    def memory(self, rank: int) -> Path:
        """The memory use of a rank, if it was measured."""
        return self.root / f"memory-{rank}.json"

    @property
    def done(self) -> Path:
        """JSON with the stage's result; exists only once the stage is complete."""
        return self.root / "done.json"


@dataclass(frozen=True)
class RunPaths:
    """The paths of the files of one run. Their names are defined only here."""

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
        """Folder of the run's events: a file of JSON lines for each process that wrote any (see `events`)."""
        return self.root / "events"

    @property
    def old_events(self) -> Path:
        """The single events file of a run that was made by an earlier version."""
        return self.root / "events.jsonl"

    @property
    def running(self) -> Path:
        """Claim on the run: exists while a process executes it, and identifies that process (see `claims`)."""
        return self.root / "running"

    @property
    def jobs(self) -> Path:
        """Folder of the records of cluster jobs: what was submitted, and how it ended (see `jobs`)."""
        return self.root / "jobs"

    @property
    def units(self) -> Path:
        """Folder of the claims on parts of the run that cluster jobs execute in parallel; like `running`."""
        return self.jobs / "running"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def code(self) -> Path:
        """A copy of the package from when the run was submitted."""
        return self.root / "code"

    @property
    def students(self) -> Path:
        return self.root / "students"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def comparison(self) -> Path:
        """Exists in a run that compares recipes: the recipes and their budget (see `comparison_table`)."""
        return self.root / "comparison.json"

    @property
    def comparison_table(self) -> Path:
        return self.root / "comparison.md"

    @property
    def comparison_figure(self) -> Path:
        return self.root / "comparison.svg"

    def log(self, rank: int) -> Path:
        """The log of a rank other than 0. The output of rank 0 goes to the terminal."""
        return self.logs / f"rank-{rank}.log"

    def stage(self, name: str) -> StagePaths:
        return StagePaths(self.root / "stages" / self._part(name))

    def tracking(self, tracker: str) -> Path:
        """Folder of the files of a tracker (see `trackers`)."""
        return self.root / "tracking" / tracker

    def student(self, stage: str) -> Path:
        """Folder of the student that a train stage exports."""
        return self.students / self._part(stage)

    def _part(self, name: str) -> str:
        """`name` if it is valid for a stage, else InputError. It may come from a file, so it must not be a path."""
        if NAME.fullmatch(name) is None:
            raise InputError(f"{self.root} has no stage '{one_line(name)}': that is not a valid stage name")
        return name


def runs(store: Path) -> list[RunPaths]:
    """All runs of a store, sorted by name, including damaged ones. InputError if the store cannot be read."""
    return [
        RunPaths(store / name) for name in records.names(store) if not name.startswith(".") and is_run(store / name)
    ]


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, perhaps a damaged one: it has an entry spec.yaml, or may not be read."""
    try:
        os.lstat(f"{folder}/spec.yaml")
    except PermissionError:
        return True
    except OSError:  # it does not exist, or is not a valid file name
        return False
    return True


def check_spec(run: RunPaths) -> None:
    """Raise InputError unless a run's spec is a regular file, so that readers do not block on a pipe."""
    try:
        mode = run.spec.stat().st_mode
    except OSError as error:
        raise InputError(f"{run.spec} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise InputError(
            f"{run.spec} cannot be read: it is not a regular file; replace it with the run's spec, or delete the run"
        )


def find_run(store: Path, given: str) -> RunPaths:
    """The run given by its name in the store or by the path of its folder. InputError if there is none."""
    for root in (store / given, Path(given)):
        if is_run(root):
            check_spec(RunPaths(root))
            return RunPaths(root.absolute())
    names = [run.name for run in runs(store)]
    hint = suggest(given, names) if names else "the store is empty; `distill run digits` creates a first run"
    raise InputError(f"there is no run '{short(given)}' in {store}; {hint}")


def make(store: Path) -> None:
    """Create the folder of a store if it does not exist. InputError if that fails."""
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(_unusable(store, error)) from None


def _unusable(store: Path, error: OSError) -> str:
    return f"cannot create a run in the store {store}: {error.strerror}; choose another with --store"


def create_run(store: Path, name: str, files: Mapping[str, str | bytes]) -> RunPaths:
    """Create a run with these files (relative path -> content), atomically. InputError if its name is in use."""
    refuse_reserved(name)
    run = RunPaths(store.absolute() / name)
    make(store)
    try:
        clear_up(store)  # for runs of all names, since a name is rarely used again
        with new_folder(run.root) as new:  # fails if a run of this name exists, since its folder is not empty
            write_files(new, files)
    except OSError as error:
        raise InputError(name_in_use(run) if run.root.exists() else _unusable(store, error)) from None
    return run


def refuse_reserved(name: str) -> None:
    """Raise InputError for a name that the store uses itself."""
    if name in RESERVED:
        raise InputError(
            f"a run cannot be called '{name}': the store uses that folder for {RESERVED[name]}; choose another name "
            "(name: in the spec, or --name OTHER)"
        )


def name_in_use(run: RunPaths) -> str:
    """The message for a run name that is already in use, with what the user can do."""
    if not run.spec.is_file():  # e.g. a folder of other files
        return f"{run.root} exists already and is not a run; choose another name with --name OTHER"
    return (
        f"there is a run '{run.name}' in {run.root.parent} already; "
        "resume it with --resume, or start another with --name OTHER"
    )


def event_line(event: str, **fields: Any) -> str:  # noqa: ANN401
    """An event as a JSON line: {"time": unix seconds, "event": event, ...}."""
    return json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n"


def append_event(run: RunPaths, event: str, **fields: Any) -> None:  # noqa: ANN401
    """Append an event to this process's own file in the run's events."""
    append_line(run.events / f"{Owner.this().token}{events.SUFFIX}", event_line(event, **fields))


def append_line(path: Path, line: str) -> None:
    """Append a line to a file that only this process writes. Creates its folder. RunError if it cannot be written."""
    lease.confirm()
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("ab+", buffering=0) as file:  # one write for each line
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the previous line was cut short, as by a full disk
                    line = "\n" + line
            content = line.encode()
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def event_files(run: RunPaths) -> list[Path]:
    """The event files of a run, including the single file of an earlier version."""
    return events.files(run.events, run.old_events)


def first_event(run: RunPaths) -> dict[str, Any]:
    """The event of the run's creation; {} if there is none."""
    return events.first(run.root / CREATED) or events.first(run.old_events)


def read_events(run: RunPaths, kinds: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """The run's events, oldest first, read lazily. kinds: only events of these kinds; empty: all. See `events`."""
    return events.read(event_files(run), events.RUN, kinds)
