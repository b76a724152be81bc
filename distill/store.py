"""Where things lie. A run is a directory; state appears complete (write, fsync, rename) or not at all."""

import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import events, lease, records
from distill.fieldtypes import NAME
from distill.guard import InputError, RunError, one_line, short, suggest
from distill.owners import Owner
from distill.records import read_json as read_json  # for all who read a run

RESERVED = {
    "indexes": "image indexes",
    "inputs": "files fetched from the hub",
    "registry": "published students",
    "schedules": "step times",
}
CREATED = "events/created.jsonl"  # in the folder of a run: its first event, written with it
UNFINISHED = re.compile(r"\..*\.new-([0-9].*)")  # folder of a run that is being made, with the label of its process
FORGOTTEN_SECONDS = 86400.0


def sync_dir(path: Path) -> None:
    """Make renames within `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a new folder durable, files first."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_dir(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_dir(folder)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` so that `path` holds either the old or the new whole, whatever happens."""
    lease.confirm()
    temporary = path.with_name(f".{path.name[:50]}.tmp-{os.getpid()}-{secrets.token_hex(4)}")  # hosts share numbers
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # of a name that is too long, or below a file, there is nothing
            temporary.unlink()
        raise RunError(f"cannot write {path}: {error.strerror}; nothing was changed") from error
    sync_dir(path.parent)


def write_first(path: Path, content: str | bytes) -> None:
    """`write_atomic`, unless another process has been first: then its content stays."""
    temporary = path.with_name(f".{path.name[:50]}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    write_atomic(temporary, content)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        pass
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; nothing was changed") from error
    finally:
        temporary.unlink()
    sync_dir(path.parent)


def write_json(path: Path, content: Any) -> None:  # noqa: ANN401  (anything json takes)
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(content, indent=2, sort_keys=False) + "\n")


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
        """Exists while a process executes the run; says which (see `claims`)."""
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
        """Exists in a run that compares recipes: which, and for how long (see `compared`)."""
        return self.root / "comparison.json"

    @property
    def comparison_table(self) -> Path:
        return self.root / "comparison.md"

    @property
    def comparison_figure(self) -> Path:
        return self.root / "comparison.svg"

    def log(self, rank: int) -> Path:
        """What a rank says that is not the first: that one speaks on the terminal."""
        return self.logs / f"rank-{rank}.log"

    def stage(self, name: str) -> StagePaths:
        return StagePaths(self.root / "stages" / self._part(name))

    def student(self, stage: str) -> Path:
        """The student exported by a train stage."""
        return self.students / self._part(stage)

    def _part(self, name: str) -> str:
        """The name of a stage, which leads to no other folder. InputError if it is none: it may come from a file."""
        if NAME.fullmatch(name) is None:
            raise InputError(f"{self.root} has no stage '{one_line(name)}': that is no name of a stage")
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
    """InputError unless a run's spec is a file that can be looked at: whoever reads it is not to wait for a pipe."""
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
    return f"cannot make a run in the store {store}: {error.strerror}; choose another by --store"


def create_run(store: Path, name: str, files: Mapping[str, str | bytes]) -> RunPaths:
    """A new run with these files, complete or not at all: written under a hidden name, then renamed."""
    refuse_reserved(name)
    run = RunPaths(store.absolute() / name)
    temporary = store.absolute() / f".{name}.new-{Owner.this().label}"
    make(store)
    try:
        _clear(store)
        temporary.mkdir()
    except OSError as error:
        raise InputError(_unusable(store, error)) from None
    try:
        for relative, content in files.items():
            path = temporary / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
        temporary.rename(run.root)  # refused where a run of this name is: its folder is not empty
    except OSError as error:
        taken = run.root.exists()
        raise InputError(name_in_use(run) if taken else f"cannot make {run.root}: {error.strerror}") from None
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    sync_dir(store)
    return run


def refuse_reserved(name: str) -> None:
    """InputError for a name that a store uses itself."""
    if name in RESERVED:
        raise InputError(
            f"a run cannot be called '{name}': the store uses that folder for {RESERVED[name]}; choose another name "
            "(name: in the spec, or --name OTHER)"
        )


def _clear(store: Path) -> None:
    """Remove what processes left that were killed while they made a run: of this host once they are gone, of others
    after a day.
    """
    for folder in store.glob(".*.new-*"):
        if (match := UNFINISHED.fullmatch(folder.name)) is None:
            continue
        owner = Owner.of_label(match[1])
        if not owner.is_alive() if owner is not None and owner.is_here else _is_old(folder):
            shutil.rmtree(folder, ignore_errors=True)  # another process may clear it too, and it may not be ours


def _is_old(folder: Path) -> bool:
    try:
        return time.time() - folder.lstat().st_mtime > FORGOTTEN_SECONDS
    except OSError:  # another process has cleared it
        return False


def name_in_use(run: RunPaths) -> str:
    """What to say when a run's name is taken, with both ways out."""
    if not run.spec.is_file():  # the students that were published, for one
        return f"{run.root} exists already and is not a run; choose another name by --name OTHER"
    return (
        f"there is a run '{run.name}' in {run.root.parent} already; "
        "go on with it by --resume, or start another by --name OTHER"
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
