"""Downloads what a run reads from the Hugging Face hub before its job is queued, because jobs run without a network.

STORE/inputs/DIGEST is one input, which any number of runs may share: `content` (the files of a commit, or the rows of a
data set's split) and `input.json`. It appears complete or not at all, and never changes. A run has a list of its inputs
and links to them, in `inputs/hub` and `inputs/datasets`, which its jobs use in place of the user's caches. The links
are relative, so that a store can be moved, or mounted at another path in a container.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from distill.core.atomic import hidden, new_folder, write_atomic, write_json
from distill.core.errors import InputError, RunError
from distill.core.field_types import Below
from distill.core.hub_repository import Repository
from distill.core.printing import say_error, warn
from distill.core.records import SMALL, Schema, mistake
from distill.core.regular_files import read_regular
from distill.core.space import human
from distill.runs.run_store import RunPaths, runs
from distill.spec import cacheuse
from distill.spec.model import CheckpointTeacher, HfData, RunSpec

RECORD = "inputs/inputs.json"  # in the folder of a run: the list of its inputs
UNUSED_SECONDS = 86400.0  # an input that was requested within the last day may belong to a run that is being created


Bytes = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Input:
    """A commit of a hub repository, or a part of it, in the store."""

    what: Literal["teacher", "data"]
    id: Below
    revision: Below | None  # as in the spec
    commit: Annotated[str, Field(pattern=r"\A[0-9a-f]{40}\z")]  # of the revision when it was fetched
    digest: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]  # of `what`, `id`, `commit` and the part
    link: Annotated[Below, Field(pattern=r"\A(hub/models--[^/]+/snapshots/[0-9a-f]{40}|datasets/fetched(/[^/]+){3})\z")]
    """path of the run's link to it, below its folder `inputs`"""
    bytes: Bytes = 0

    def folder(self, store: Path) -> Path:
        return store / "inputs" / self.digest

    def content(self, store: Path) -> Path:
        return self.folder(store) / "content"

    def __str__(self) -> str:
        return f"{self.what} {self.id}@{self.commit[:12]}"


INPUTS = Schema[list[Input]](list[Input])


@dataclass(frozen=True)
class _Fetched:
    """The part of input.json that is read; the rest is information for users."""

    bytes: Bytes


FETCHED = Schema[_Fetched](_Fetched)


# --- before a run is created ---


def resolve(spec: RunSpec, store: Path, before: Sequence[Input] = ()) -> list[Input]:
    """Download everything that the spec names by hub id to the store, except for streams, and report it on stderr.

    A revision is resolved to its current commit. InputError if a download fails.

    before: the inputs of the run if it is resumed; it keeps their commits.
    """
    found = []
    for each in _repositories(spec, {(input.what, input.id, input.revision): input.commit for input in before}):
        digest = _digest(each.what, each.id, each.commit, *each.part)
        wanted = Input(each.what, each.id, each.revision, each.commit, digest, each.link)
        found.append(_in_store(wanted, store, each))
        say_error(f"{wanted}: {human(found[-1].bytes)} in {found[-1].folder(store)}")
    return found


def _repositories(spec: RunSpec, commits: Mapping[tuple[str, str, str | None], str]) -> Iterator[Repository]:
    """The repositories that the spec names by hub id. commits: known ones by (what, id, revision)."""
    teacher, data = spec.teacher, spec.data
    if isinstance(teacher, CheckpointTeacher) and teacher.is_of_hub:
        from distill.teachers import by_id

        commit = commits.get(("teacher", teacher.path, teacher.revision))
        yield by_id.repository(teacher, commit, encoders=cacheuse.may_store_prompts(spec))
    if isinstance(data, HfData) and data.is_downloaded:
        from distill.data import tables

        yield tables.repository(data, commits.get(("data", data.path, data.revision)))


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _refuse_without_room(what: str, needs: Sequence[tuple[Path, int]]) -> None:
    """InputError if a disk has less free space than will be written to it. needs: (folder, bytes)."""
    shared: dict[int, list[tuple[Path, int]]] = {}
    for place, count in needs:
        existing = next(path for path in [place.absolute(), *place.absolute().parents] if path.exists())
        shared.setdefault(existing.stat().st_dev, []).append((existing, count))
    for places in shared.values():
        count, free = sum(count for _, count in places), shutil.disk_usage(places[0][0]).free
        if count > free:
            raise InputError(
                f"{what} needs {human(count)} in {' and '.join(str(path) for path, _ in places)}, "
                f"but only {human(free)} are free; free some space, or set other folders with --store and HF_HOME"
            )


def _in_store(wanted: Input, store: Path, repository: Repository) -> Input:
    """The input in the store. It is downloaded under a temporary name, unless it is there already.

    An incomplete folder with its name is not changed, because runs may use it; the input then gets another digest.
    """
    for number in itertools.count(1):
        folder = wanted.folder(store)
        if not folder.is_symlink() and not folder.exists():
            break
        try:
            found = _with_size(wanted, folder)
        except (OSError, ValidationError) as error:
            reason = mistake(error) if isinstance(error, ValidationError) else error.strerror
            warn(f"{folder} is incomplete (input.json: {reason}); the {wanted} is downloaded again to another folder")
            wanted = replace(wanted, digest=_digest(wanted.digest, f"{number}"))
            continue
        with suppress(OSError):  # the folder may belong to another user
            os.utime(folder)
        return found
    try:
        _refuse_without_room(f"{wanted.what}.path={wanted.id}", repository.needs(store))
        copy = repository.download()  # before anything is created in the store
        with new_folder(folder) as new:
            copy(new / "content")
            size = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
            write_json(new / "input.json", asdict(replace(wanted, bytes=size)))
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was first, and its folder is used
            raise RunError(f"cannot write {folder}: {error.strerror or error}; nothing of it was kept") from error
    return _with_size(wanted, folder)


def _with_size(wanted: Input, folder: Path) -> Input:
    """The input with its size in bytes. OSError or pydantic's ValidationError if the folder is not complete."""
    os.listdir(folder / "content")  # noqa: PTH208  (Path.iterdir would raise only when it is iterated)
    return replace(wanted, bytes=FETCHED.parse(read_regular(folder / "input.json", SMALL)).bytes)


# --- of a run ---


def record(inputs: Sequence[Input]) -> dict[str, str]:
    """The list of inputs as a file of the run, by path: `create_run` writes it."""
    return {RECORD: json.dumps([asdict(each) for each in inputs], indent=2) + "\n"}


def keep(run: RunPaths, inputs: Sequence[Input]) -> None:
    """Write the list of inputs of an existing run, e.g. one made by `distill run`, and link to them."""
    for name, text in record(inputs).items():
        (run.root / name).parent.mkdir(exist_ok=True)
        write_atomic(run.root / name, text)
    link(run)


def read(run: RunPaths) -> list[Input]:
    """The inputs of a run; empty if they were not downloaded beforehand. RunError if the list cannot be read."""
    path = run.root / RECORD
    try:
        return INPUTS.parse(read_regular(path, SMALL))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValidationError) as error:
        reason = mistake(error) if isinstance(error, ValidationError) else error.strerror
        raise RunError(f"{path} cannot be read ({reason}); start a new run with another name") from error


def link(run: RunPaths) -> None:
    """Create the links to the run's inputs, unless they exist. RunError if an input is not in the store any more."""
    store = run.root.parent
    for each in read(run):
        content, place = each.content(store), run.root / "inputs" / each.link
        if not content.is_dir():
            raise RunError(f"the {each} is no longer in {each.folder(store)}; submit the run again with --resume")
        place.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(content, place.parent)
        if not (place.is_symlink() and str(place.readlink()) == target):
            temporary = hidden(place)
            temporary.symlink_to(target)
            temporary.replace(place)
        if each.what == "teacher":  # in the hub's cache, a file has the commit of each revision
            name = place.parent.parent / "refs" / (each.revision or "main")
            if not name.is_file():
                name.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(name, each.commit)


def environment(kinds: Collection[str], root: Path) -> dict[str, str]:
    """Environment variables for the jobs of a run. kinds: of its inputs. root: path of the run, as seen by the job."""
    caches = {"teacher": ("HF_HUB_CACHE", "hub"), "data": ("HF_DATASETS_CACHE", "datasets")}
    places = {variable: str(root / "inputs" / name) for variable, name in (caches[kind] for kind in sorted(kinds))}
    return {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **places}


def unused(store: Path) -> list[Path]:
    """Folders that can be deleted: inputs that no run uses, and the rest of interrupted downloads.

    What was requested within the last day is left out. If the list of a run cannot be read, a warning is shown, and
    everything that the run may need is left out: each input whose digest occurs in its list, and each one requested
    later than 24 hours before the run was created.
    """
    used, before = set(), time.time() - UNUSED_SECONDS
    for run in runs(store):
        try:
            used |= {each.digest for each in read(run)}
        except RunError as error:
            warn(f"{error}; inputs that this run may need are kept")
            used |= _named(run)
            before = min(before, _made(run) - UNUSED_SECONDS)
    found = sorted((store / "inputs").glob("*")) if (store / "inputs").is_dir() else []
    folders = [path for path in found if path.is_dir() and not path.is_symlink()]
    return [path for path in folders if path.name not in used and path.stat().st_mtime < before]


def _named(run: RunPaths) -> set[str]:
    """Everything in the run's list of inputs that looks like a digest."""
    try:
        return {name.decode() for name in re.findall(rb"[0-9a-f]{64}", read_regular(run.root / RECORD, SMALL))}
    except OSError:
        return set()


def _made(run: RunPaths) -> float:
    """A time (seconds since the epoch) when the run existed already; 0 if it is not known."""
    try:
        return min(path.lstat().st_mtime for path in run.root.iterdir())
    except (OSError, ValueError):
        return 0.0
