"""What is known of every image of a set without decoding it: checksums, sizes and labels, found once for all runs.

To index a set, each file is read once, for its checksum and its header. An image is decoded only where the header
cannot tell whether it can be used: if its end is missing, it has an alpha channel, its values may lie out of range, or
its format is rare. Damage in the middle of a file is found when the image is used.

STORE/indexes keeps them for later runs, RUN/indexes those of a run, for its ranks and stages: what other runs write
does not change it. A file whose size and times are the same as before is not read again. Indexes may be deleted at any
time. Those of a store may be anybody's: they are validated, and a file that is not an index is made again.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import save

from distill.core.atomic import write_atomic
from distill.core.errors import InputError, RunError
from distill.core.regular_files import read_regular
from distill.data.decoding import UNREADABLE, decode, header, is_transparent
from distill.data.rows import FileRows, ImageRows
from distill.spec.imagefolder import MAX_CLASSES
from distill.spec.model import HfData, ImagesData

MAX_BYTES = 2**33  # of an index: that of about seventy million images
TYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}  # names of safetensors
THREADS = 16  # that read files: a file system of a network answers many at once
TASK = 32  # files that a thread reads in a row
CHUNK = THREADS * TASK * 8  # rows that are under way together
SETTLED = (
    2 * 10**9
)  # nanoseconds: a file changed less than this before it was indexed may change at the same time again


class State(IntEnum):
    """What can be done with an image."""

    FINE = 0
    BROKEN = 1
    """cannot be decoded"""
    TRANSPARENT = 2
    OUT_OF_RANGE = 3
    EMPTY = 4
    """there is no image in the row; it and those below have no bytes"""
    MISSING = 5
    DENIED = 6
    UNREAD = 7
    """no regular file, or the disk fails"""


REASONS = {State.MISSING: "no such file", State.DENIED: "no permission to read it", State.UNREAD: "no regular file"}


class _Head(BaseModel):
    """What an index says beside its arrays."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    num_classes: int | None = Field(ge=1, le=MAX_CLASSES)
    stamp: str
    """of the table that the rows are of; empty: they are files"""
    written: int
    """nanoseconds since 1970 when it was begun"""


@dataclass(frozen=True)
class ImageIndex:
    """Of N images, by row."""

    head: _Head
    state: NDArray[np.uint8]  # [N], of State
    sides: NDArray[np.int32]  # [N, 2]: height, width
    alpha: NDArray[np.uint8]  # [N]: whether there is an alpha channel
    file: NDArray[np.int64]  # [N, 3]: bytes, and when content and anything of the file changed, in ns since 1970
    sha256: NDArray[np.uint8]  # [N, 32], of the stored bytes
    labels: NDArray[np.int64]  # [N], or [0]: unconditional
    names: NDArray[np.uint8]  # of the files, one after the other
    ends: NDArray[np.int64]  # [N]: where in `names` each ends

    def __len__(self) -> int:
        return len(self.state)

    def name(self, row: int) -> str:
        """Of the row's file; empty: it has none of its own."""
        start = int(self.ends[row - 1]) if row else 0
        return os.fsdecode(self.names[start : int(self.ends[row])].tobytes())

    def is_same(self, row: int, found: os.stat_result) -> bool:
        """Whether a file has been left alone since."""
        return tuple(self.file[row].tolist()) == _times(found)

    def is_same_content(self, row: int, found: os.stat_result) -> bool:
        """Whether a file has not been written to since; its owner, permissions or links may have changed."""
        return tuple(self.file[row, :2].tolist()) == _times(found)[:2]


@dataclass(frozen=True)
class FoundImages:
    """What a look at a set tells without reading its images."""

    rows: ImageRows
    files: Sequence[str]
    """of each row; empty: the image has no file of its own"""
    stats: Sequence[os.stat_result | None]
    """of these files; None: they may not be seen, or there is none"""
    labels: Sequence[int] | None
    num_classes: int | None
    stamp: str = ""
    """changes with the rows that have no files of their own"""


def path(folder: Path, spec: ImagesData | HfData) -> Path:
    """Where a store or a run keeps the index of a set."""
    place = str(Path(spec.path).absolute()) if Path(spec.path).exists() else spec.path
    parts = [spec.kind, place, spec.background is None]
    if isinstance(spec, HfData):
        parts += [spec.revision, spec.split, spec.image_column, spec.label_column]
    return folder / "indexes" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.safetensors"


def read(path: Path) -> ImageIndex | None:
    """The index in a file; None if there is none, or it is damaged or of another version."""
    try:
        content = read_regular(path, MAX_BYTES)
        tensors = dict(safetensors.deserialize(content))
        size = int.from_bytes(content[:8], "little")
        head = _Head.model_validate_json(json.loads(content[8 : 8 + size]).get("__metadata__", {}).get("index", ""))
    except (OSError, safetensors.SafetensorError, ValidationError):
        return None
    if not all(each["dtype"] in TYPES for each in tensors.values()):
        return None
    arrays: dict[str, NDArray[np.generic]] = {
        name: np.frombuffer(each["data"], TYPES[each["dtype"]]).reshape(each["shape"]) for name, each in tensors.items()
    }
    n = arrays["state"].size if "state" in arrays else 0
    byte, long, short = np.dtype(np.uint8), np.dtype(np.int64), np.dtype(np.int32)
    wanted = {
        "state": (byte, (n,)),
        "sides": (short, (n, 2)),
        "alpha": (byte, (n,)),
        "file": (long, (n, 3)),
        "sha256": (byte, (n, 32)),
        "labels": (long, (n if head.num_classes else 0,)),
        "names": (byte, (arrays["names"].size,) if "names" in arrays else ()),
        "ends": (long, (n,)),
    }
    if {name: (array.dtype, array.shape) for name, array in arrays.items()} != wanted or n == 0:
        return None
    index = ImageIndex(head, **arrays)  # type: ignore[arg-type]  # of these types: they were compared
    in_order = index.ends[0] >= 0 and (np.diff(index.ends) >= 0).all() and index.ends[-1] == len(index.names)
    labelled = head.num_classes is None or (index.labels.min() >= 0 and index.labels.max() < head.num_classes)
    known = index.state.max() <= max(State) and index.sides.min() >= 0
    return index if in_order and labelled and known else None


def write(path: Path, index: ImageIndex) -> None:
    """Whole or not at all; RunError if it cannot be written."""
    arrays = {name: value for name, value in vars(index).items() if name != "head"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {path.parent}: {error.strerror}; nothing was changed") from error
    write_atomic(path, save(arrays, metadata={"index": index.head.model_dump_json()}))


def make(found: FoundImages, old: ImageIndex | None, *, flatten: bool) -> ImageIndex:
    """The index of a set, with what an older one still knows; that one itself, where nothing has changed.

    flatten: transparent images will be laid on a background, so that none has to be decoded for it.
    """
    rows, n = found.rows, len(found.rows)
    head = _Head(num_classes=found.num_classes, stamp=found.stamp, written=time.time_ns())
    names = [os.fsencode(name) for name in found.files]
    index = ImageIndex(
        head,
        state=np.zeros(n, np.uint8),
        sides=np.zeros((n, 2), np.int32),
        alpha=np.zeros(n, np.uint8),
        file=np.zeros((n, 3), np.int64),
        sha256=np.zeros((n, 32), np.uint8),
        labels=np.array([] if found.labels is None else found.labels, np.int64),
        names=np.frombuffer(b"".join(names), np.uint8),
        ends=np.cumsum([len(name) for name in names], dtype=np.int64),
    )
    new, known = _compare(found, old)
    if old is not None and len(known) == n == len(old) and _same_set(index, old):
        return old
    if old is not None and len(known):
        ours, theirs = np.array(list(known)), np.array(list(known.values()))
        for name in ("state", "sides", "alpha", "file", "sha256"):
            getattr(index, name)[ours] = getattr(old, name)[theirs]
    for row, facts in _read_all(rows, new, flatten):
        index.state[row], index.alpha[row] = facts.state, facts.alpha
        index.sides[row] = facts.sides
        index.file[row] = facts.file
        index.sha256[row] = np.frombuffer(facts.sha256, np.uint8)
    return index


def _same_set(a: ImageIndex, b: ImageIndex) -> bool:
    return (
        a.head.model_copy(update={"written": 0}) == b.head.model_copy(update={"written": 0})
        and np.array_equal(a.labels, b.labels)
        and np.array_equal(a.ends, b.ends)
        and np.array_equal(a.names, b.names)
    )


def _compare(found: FoundImages, old: ImageIndex | None) -> tuple[list[int], dict[int, int]]:
    """The rows to read, and the others with their row in the old index."""
    n = len(found.rows)
    if old is None or old.head.stamp != found.stamp or (found.stamp and len(old) != n):
        return list(range(n)), {}
    where = {old.name(row): row for row in range(len(old))} if not found.stamp else {}
    new, known = [], {}
    for row in range(n):
        name, state = found.files[row], found.stats[row]
        before = row if found.stamp else where.get(name)
        if before is not None and (not name or (state is not None and _is_settled(old, before, state))):
            known[row] = before
        else:
            new.append(row)
    return new, known


def _is_settled(old: ImageIndex, row: int, state: os.stat_result) -> bool:
    return old.is_same(row, state) and state.st_mtime_ns < old.head.written - SETTLED


def _times(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


# --- one image ---


@dataclass(frozen=True)
class _Facts:
    state: State
    sides: tuple[int, int] = (0, 0)
    alpha: bool = False
    file: tuple[int, int, int] = (0, 0, 0)
    sha256: bytes = bytes(32)


def _read_all(rows: ImageRows, wanted: Sequence[int], flatten: bool) -> Iterator[tuple[int, _Facts]]:
    """The facts of these rows. Files are read by several threads."""
    if not isinstance(rows, FileRows):
        yield from ((row, _facts(rows, flatten, row)) for row in wanted)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(wanted), CHUNK):
            tasks = [wanted[i : i + TASK] for i in range(start, min(start + CHUNK, len(wanted)), TASK)]
            for task, facts in zip(tasks, pool.map(partial(_task, rows, flatten), tasks), strict=True):
                yield from zip(task, facts, strict=True)


def _task(rows: ImageRows, flatten: bool, part: Sequence[int]) -> list[_Facts]:
    return [_facts(rows, flatten, row) for row in part]


def _facts(rows: ImageRows, flatten: bool, row: int) -> _Facts:
    try:
        found = rows.read(row)
    except OSError as error:
        known = {errno.ENOENT: State.MISSING, errno.ENOTDIR: State.MISSING, errno.ELOOP: State.MISSING}
        known |= {errno.EACCES: State.DENIED, errno.EPERM: State.DENIED}
        return _Facts(known.get(error.errno or 0, State.UNREAD))
    if found is None:
        return _Facts(State.EMPTY)
    facts = _of_bytes(found.content, flatten)
    file = _times(found.file) if found.file is not None else (0, 0, 0)
    return replace(facts, file=file, sha256=hashlib.sha256(found.content).digest())


def _of_bytes(content: bytes, flatten: bool) -> _Facts:
    try:
        head = header(content)
        facts = _Facts(State.FINE, (head.height, head.width), head.alpha)
        if head.alpha and not flatten and is_transparent(content):
            return replace(facts, state=State.TRANSPARENT)
        if head.decoded:
            decode(content, "", (1, 1), 3, (0, 0, 0))
    except InputError:
        return replace(facts, state=State.OUT_OF_RANGE)
    except UNREADABLE:
        return _Facts(State.BROKEN)
    return facts
