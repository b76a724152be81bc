"""The files of a run and of a store. A run is a folder; state appears complete (write, fsync, rename) or not at all."""

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
    "indexes": "image indexes",
    "inputs": "files fetched from the hub",
    "registry": "published students",
    "schedules": "step times",
}
CREATED = "events/created.jsonl"  # in the folder of a run: its first event, written with it


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
    def times(self) -> Path:
        """JSON with the times of the states that a train stage's pairs had; the pairs may be deleted."""
        return self.root / "times.json"

    @property
    def micro_batch(self) -> Path:
        """JSON with the micro-batch that was chosen for launch.micro_batch=auto."""
        return self.root / "micro_batch.json"

    def memory(self, rank: int) -> Path:
        """What a rank's memory held, where it was measured."""
        return self.root / f"memory-{rank}.json"

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
        """What happened: a file of JSON lines for each process that noted something (see `events`)."""
        return self.root / "events"

    @property
    def old_events(self) -> Path:
        """The same in one file, of a run made by an earlier version."""
        return self.root / "events.jsonl"

    @property
    def running(self) -> Path:
        """Exists while a process executes the run, and names it (see `claims`)."""
        return self.root / "running"

    @property
    def jobs(self) -> Path:
        """What was submitted to a cluster, and how it ended (see `jobs`)."""
        return self.root / "jobs"

    @property
    def units(self) -> Path:
        """Like `running`, of parts of the run that jobs of a cluster execute side by side."""
        return self.jobs / "running"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def code(self) -> Path:
        """The package as it was when the run was submitted."""
        return self.root / "code"

    @property
    def students(self) -> Path:
        return self.root / "students"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def comparison(self) -> Path:
        """Exists in a run that compares recipes: which, and for how long (see `comparison_table`)."""
        return self.root / "comparison.json"

    @property
    def comparison_table(self) -> Path:
        return self.root / "comparison.md"

    @property
    def comparison_figure(self) -> Path:
        return self.root / "comparison.svg"

    def log(self, rank: int) -> Path:
        """The output of a rank other than the first, whose output goes to the terminal."""
        return self.logs / f"rank-{rank}.log"

    def stage(self, name: str) -> StagePaths:
        return StagePaths(self.root / "stages" / self._part(name))

    def student(self, stage: str) -> Path:
        """The student exported by a train stage."""
        return self.students / self._part(stage)

    def _part(self, name: str) -> str:
        """The name of a stage, which leads to no other folder. InputError if it is none: it may come from a file."""
        if NAME.fullmatch(name) is None:
            raise InputError(f"{self.root} has no stage '{one_line(name)}': that is not a stage name")
        return name


def runs(store: Path) -> list[RunPaths]:
    """All runs of a store, by name, damaged ones too; InputError if the store cannot be read."""
    return [
        RunPaths(store / name) for name in records.names(store) if not name.startswith(".") and is_run(store / name)
    ]


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, perhaps a damaged one: has something called spec.yaml, or is closed to us."""
    try:
        os.lstat(f"{folder}/spec.yaml")
    except PermissionError:
        return True
    except OSError:  # nothing there, or no name that a file can have
        return False
    return True


def check_spec(run: RunPaths) -> None:
    """InputError unless a run's spec is a file that can be read: readers must not wait for a pipe."""
    try:
        mode = run.spec.stat().st_mode
    except OSError as error:
        raise InputError(f"{run.spec} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{run.spec} cannot be read: it is not a file; remove the run, or put its spec there")


def find_run(store: Path, given: str) -> RunPaths:
    """The run that a user names: by its name in the store, or by the path of its folder. InputError without one."""
    for root in (store / given, Path(given)):
        if is_run(root):
            check_spec(RunPaths(root))
            return RunPaths(root.absolute())
    names = [run.name for run in runs(store)]
    hint = suggest(given, names) if names else "the store is empty; `distill run digits` makes a first run"
    raise InputError(f"there is no run '{short(given)}' in {store}; {hint}")


def make(store: Path) -> None:
    """The folder of a store, unless it is there."""
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(_unusable(store, error)) from None


def _unusable(store: Path, error: OSError) -> str:
    return f"cannot make a run in the store {store}: {error.strerror}; choose another with --store"


def create_run(store: Path, name: str, files: Mapping[str, str | bytes]) -> RunPaths:
    """A new run with these files, complete or not at all."""
    refuse_reserved(name)
    run = RunPaths(store.absolute() / name)
    make(store)
    try:
        clear_up(store)  # of runs of any name: few names are used twice
        with new_folder(run.root) as new:  # refused where a run of this name is: its folder is not empty
            write_files(new, files)
    except OSError as error:
        raise InputError(name_in_use(run) if run.root.exists() else _unusable(store, error)) from None
    return run


def refuse_reserved(name: str) -> None:
    """InputError for a name that a store uses itself."""
    if name in RESERVED:
        raise InputError(
            f"a run cannot be called '{name}': the store uses that folder for {RESERVED[name]}; choose another name "
            "(name: in the spec, or --name OTHER)"
        )


def name_in_use(run: RunPaths) -> str:
    """The message for a run's name that is taken, with both remedies."""
    if not run.spec.is_file():  # the students that were published, for one
        return f"{run.root} exists already and is not a run; choose another name by --name OTHER"
    return (
        f"there is a run '{run.name}' in {run.root.parent} already; "
        "resume it with --resume, or start another with --name OTHER"
    )


def event_line(event: str, **fields: Any) -> str:  # noqa: ANN401
    """A JSON line of a run's events: {"time": unix seconds, "event": event, ...}."""
    return json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n"


def append_event(run: RunPaths, event: str, **fields: Any) -> None:  # noqa: ANN401
    """One line in the run's events, in this process's own file."""
    append_line(run.events / f"{Owner.this().token}{events.SUFFIX}", event_line(event, **fields))


def append_line(path: Path, line: str) -> None:
    """One line more in a file of lines that no other process writes; its folder is made if there is none."""
    lease.confirm()
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("ab+", buffering=0) as file:  # one write for each line
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a full disk cut the line before
                    line = "\n" + line
            content = line.encode()
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def event_files(run: RunPaths) -> list[Path]:
    """The files of the run's events, also of one made by an earlier version."""
    return events.files(run.events, run.old_events)


def first_event(run: RunPaths) -> dict[str, Any]:
    """The event that the run was made with; {}: there is none."""
    return events.first(run.root / CREATED) or events.first(run.old_events)


def read_events(run: RunPaths, kinds: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """The run's events, oldest first, in a stream; of some kinds only, if any is named. See `events`."""
    return events.read(event_files(run), events.RUN, kinds)
