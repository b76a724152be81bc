"""The index of an image data set: checksum, size, state and label of every image, computed once for all runs.

To make an index, each file is read once for its checksum and its header. An image is decoded only if the header cannot
tell whether the image is usable: if its end is missing, if it has an alpha channel, if its values may be out of range,
or if its format is rare. Damage in the middle of a file is found when the image is used.

STORE/indexes holds indexes for later runs. RUN/indexes holds a copy for the ranks and stages of one run, which other
runs do not change. A file whose size and timestamps have not changed is not read again. Indexes can be deleted at any
time. Other users may have written the indexes of a store, so every index is validated, and an invalid one is replaced.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import cached_property, partial
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
from distill.data import prompts
from distill.data.decoding import UNREADABLE, decode, header, is_transparent
from distill.data.prompts import CaptionFault, Captions, Prompts
from distill.data.rows import FileRows, ImageRows
from distill.spec.imagefolder import MAX_CLASSES
from distill.spec.model import HfData, ImagesData

MAX_BYTES = 2**33  # maximum size of an index, enough for about 70 million images
TYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}  # by safetensors' names
CAPTION_ARRAYS = {"prompts", "prompt_ends", "caption_files"}
THREADS = 16  # threads that read files, because network file systems serve many requests at once
TASK = 32  # files that a thread reads per task
CHUNK = THREADS * TASK * 8  # rows that are submitted together
# In nanoseconds. A file that was modified less than this before indexing may have been modified again within the
# resolution of its timestamp, so it is read again.
SETTLED = 2 * 10**9


class State(IntEnum):
    """Whether an image can be used, and if not, why. From EMPTY on, the image has no bytes."""

    FINE = 0
    BROKEN = 1
    """cannot be decoded"""
    TRANSPARENT = 2
    OUT_OF_RANGE = 3
    EMPTY = 4
    """the row has no image"""
    MISSING = 5
    DENIED = 6
    UNREAD = 7
    """not a regular file, or a read error"""


REASONS = {State.MISSING: "no such file", State.DENIED: "no permission to read it", State.UNREAD: "not a regular file"}


class _Head(BaseModel):
    """The metadata of an index, stored beside its arrays."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    num_classes: int | None = Field(ge=1, le=MAX_CLASSES)
    stamp: str
    """fingerprint of the table that holds the rows; empty: the rows are files"""
    written: int
    """when indexing started, in nanoseconds since 1970"""


@dataclass(frozen=True)
class ImageIndex:
    """The index of N images, by row."""

    head: _Head
    state: NDArray[np.uint8]  # [N], values of State
    sides: NDArray[np.int32]  # [N, 2]: height, width
    alpha: NDArray[np.uint8]  # [N]: whether there is an alpha channel
    file: NDArray[np.int64]  # [N, 3]: size in bytes, mtime and ctime in ns since 1970
    sha256: NDArray[np.uint8]  # [N, 32], of the stored bytes
    labels: NDArray[np.int64]  # [N], or [0] if unconditional
    names: NDArray[np.uint8]  # the bytes of all file names, concatenated
    ends: NDArray[np.int64]  # [N]: where each file name ends in `names`
    # Data with captions has these arrays, and its labels are those of `prompts.Captions`.
    prompts: NDArray[np.uint8] | None = None  # the bytes of all different captions, concatenated
    prompt_ends: NDArray[np.int64] | None = None  # where each caption ends in `prompts`
    caption_files: NDArray[np.int64] | None = None  # [N, 3]: like `file`, of the caption's file; 0: it has no own file

    def __len__(self) -> int:
        return len(self.state)

    @cached_property
    def captions(self) -> Captions | None:
        """The captions of the rows; None: the data has none."""
        if self.prompts is None or self.prompt_ends is None or self.caption_files is None:
            return None
        return Captions(Prompts(self.prompts, self.prompt_ends), self.labels, self.caption_files)

    @property
    def num_classes(self) -> int | None:
        """The number of classes, or of different captions; None: unconditional."""
        return self.head.num_classes if self.captions is None else len(self.captions.prompts)

    def name(self, row: int) -> str:
        """The name of the row's file; empty if the image has no file of its own."""
        start = int(self.ends[row - 1]) if row else 0
        return os.fsdecode(self.names[start : int(self.ends[row])].tobytes())

    def is_same(self, row: int, found: os.stat_result) -> bool:
        """Whether size, mtime and ctime of the row's file are those of the index."""
        return tuple(self.file[row].tolist()) == _times(found)

    def is_same_content(self, row: int, found: os.stat_result) -> bool:
        """Like `is_same`, but ignores ctime: owner, permissions or links of the file may have changed."""
        return tuple(self.file[row, :2].tolist()) == _times(found)[:2]


@dataclass(frozen=True)
class FoundImages:
    """The rows and labels of a data set, found without reading its images."""

    rows: ImageRows
    files: Sequence[str]
    """the file name of each row; empty: the image has no file of its own"""
    stats: Sequence[os.stat_result | None]
    """stat of these files; None: there is no file, or no permission"""
    labels: Sequence[int] | None
    """class id of each row; None: there are no classes, or captions instead"""
    num_classes: int | None
    stamp: str = ""
    """fingerprint of the table that holds the rows; empty: the rows are files"""
    captions: Captions | None = None
    """of all rows; see `Captions.of`"""


def path(folder: Path, spec: ImagesData | HfData) -> Path:
    """The path of the index of a data set in a store or a run."""
    place = str(Path(spec.path).absolute()) if Path(spec.path).exists() else spec.path
    parts = [spec.kind, place, spec.background is None]
    if isinstance(spec, HfData):
        parts += [spec.revision, spec.split, spec.image_column, spec.label_column]
    return folder / "indexes" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.safetensors"


def read(path: Path) -> ImageIndex | None:
    """Reads an index. Returns None if there is none, or if it is damaged or of another version."""
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
    captioned = not CAPTION_ARRAYS.isdisjoint(arrays)
    wanted = {
        "state": (byte, (n,)),
        "sides": (short, (n, 2)),
        "alpha": (byte, (n,)),
        "file": (long, (n, 3)),
        "sha256": (byte, (n, 32)),
        "labels": (long, (n if head.num_classes or captioned else 0,)),
        "names": (byte, (arrays["names"].size,) if "names" in arrays else ()),
        "ends": (long, (n,)),
    }
    if captioned:
        sizes = {name: (arrays[name].size,) if name in arrays else () for name in CAPTION_ARRAYS}
        wanted |= {
            "prompts": (byte, sizes["prompts"]),
            "prompt_ends": (long, sizes["prompt_ends"]),
            "caption_files": (long, (n, 3)),
        }
    if {name: (array.dtype, array.shape) for name, array in arrays.items()} != wanted or n == 0:
        return None
    index = ImageIndex(head, **arrays)  # type: ignore[arg-type]  # the types were compared above
    in_order = index.ends[0] >= 0 and (np.diff(index.ends) >= 0).all() and index.ends[-1] == len(index.names)
    labelled = _are_labels(index)
    known = index.state.max() <= max(State) and index.sides.min() >= 0
    return index if in_order and labelled and known else None


def _are_labels(index: ImageIndex) -> bool:
    """Whether the labels of an index that was read are class ids, or those of captions, which must be valid too."""
    if (captions := index.captions) is None:
        count = index.head.num_classes
        return count is None or bool(index.labels.min() >= 0 and index.labels.max() < count)
    if index.head.num_classes is not None or not prompts.are_valid(captions.prompts.content, captions.prompts.ends):
        return False
    return bool(index.labels.min() >= -max(CaptionFault) and index.labels.max() < len(captions.prompts))


def write(path: Path, index: ImageIndex) -> None:
    """Writes an index atomically. Raises RunError if it cannot be written."""
    arrays = {field.name: getattr(index, field.name) for field in fields(index) if field.name != "head"}
    arrays = {name: value for name, value in arrays.items() if value is not None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create {path.parent}: {error.strerror}; nothing was changed") from error
    write_atomic(path, save(arrays, metadata={"index": index.head.model_dump_json()}))


def make(found: FoundImages, old: ImageIndex | None, *, flatten: bool) -> ImageIndex:
    """Makes the index of a data set. Entries of `old` are reused for unchanged images.

    Returns `old` itself if nothing has changed. flatten: there is a background for transparent images, so they need not
    be decoded to check whether they are transparent.
    """
    rows, n = found.rows, len(found.rows)
    head = _Head(num_classes=found.num_classes, stamp=found.stamp, written=time.time_ns())
    names = [os.fsencode(name) for name in found.files]
    captions = found.captions
    labels = found.labels if captions is None else captions.labels
    index = ImageIndex(
        head,
        state=np.zeros(n, np.uint8),
        sides=np.zeros((n, 2), np.int32),
        alpha=np.zeros(n, np.uint8),
        file=np.zeros((n, 3), np.int64),
        sha256=np.zeros((n, 32), np.uint8),
        labels=np.array([] if labels is None else labels, np.int64),
        names=np.frombuffer(b"".join(names), np.uint8),
        ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        prompts=None if captions is None else captions.prompts.content,
        prompt_ends=None if captions is None else captions.prompts.ends,
        caption_files=None if captions is None else captions.files,
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
        and all(_are_equal(getattr(a, name), getattr(b, name)) for name in CAPTION_ARRAYS)
    )


def _are_equal(a: NDArray[np.generic] | None, b: NDArray[np.generic] | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def _compare(found: FoundImages, old: ImageIndex | None) -> tuple[list[int], dict[int, int]]:
    """Returns the rows to read, and a mapping of the unchanged rows to their rows in the old index."""
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
    """Yields each of these rows with its facts. Files are read by several threads."""
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
