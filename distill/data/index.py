"""The index of an image data set: checksum, size, state and label of every image, computed once for all runs.

To make an index, each file is read once for its checksum and its header. No image is decoded. Damage after the header,
and values that are out of range, are found when the image is used.

STORE/indexes holds indexes for later runs. RUN/indexes holds a copy for the ranks and stages of one run, which other
runs do not change. A file whose size and timestamps have not changed is not read again. Indexes can be deleted at any
time. Other users may have written the indexes of a store, so every index is validated, and an invalid one is replaced.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from distill.core.errors import RunError
from distill.data import arrayfile, prompts
from distill.data.facts import State, read_all, times
from distill.data.prompts import CaptionFault, Captions, Prompts
from distill.data.rows import FileNames, ImageRows, TarRows
from distill.spec.imagefolder import MAX_CLASSES

CAPTION_ARRAYS = {"prompts", "prompt_ends", "caption_files"}
TAR_ARRAYS = {"members", "tars", "tar_ends", "tar_stops"}
# In nanoseconds. A file that was modified less than this before indexing may have been modified again within the
# resolution of its timestamp, so it is read again.
SETTLED = 2 * 10**9


class _Head(BaseModel):
    """The metadata of an index, stored beside its arrays."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[3] = 3
    """1: sides without the orientation in the EXIF data; 2: other states, for which some images were decoded"""
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
    sides: NDArray[np.int32]  # [N, 2]: height, width of the decoded image
    alpha: NDArray[np.uint8]  # [N]: whether there is an alpha channel or a transparent colour
    file: NDArray[np.int64]  # [N, 3]: size in bytes, mtime and ctime in ns since 1970
    sha256: NDArray[np.uint8]  # [N, 32], of the stored bytes
    labels: NDArray[np.int64]  # [N], or [0] if unconditional
    names: NDArray[np.uint8]  # the bytes of all file names, concatenated
    ends: NDArray[np.int64]  # [N]: where each file name ends in `names`
    # Data with captions has these arrays, and its labels are those of `prompts.Captions`.
    prompts: NDArray[np.uint8] | None = None  # the bytes of all different captions, concatenated
    prompt_ends: NDArray[np.int64] | None = None  # where each caption ends in `prompts`
    caption_files: NDArray[np.int64] | None = None  # [N, 3]: like `file`, of the caption's file; 0: it has no own file
    # Images in T tars have these arrays; see `rows.TarRows`. Their `names` are those in the tars, `file` is of the tar.
    members: NDArray[np.int64] | None = None  # [N, 2]
    tars: NDArray[np.uint8] | None = None  # the bytes of the names of all tars, concatenated
    tar_ends: NDArray[np.int64] | None = None  # [T]: where each name ends in `tars`
    tar_stops: NDArray[np.int64] | None = None  # [T]: where the rows of each tar end

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
        return FileNames(self.names, self.ends)[row]

    def in_tars(self, root: Path) -> TarRows | None:
        """The rows, if they are images in tars. root: the folder of the tars."""
        if self.members is None or self.tars is None or self.tar_ends is None or self.tar_stops is None:
            return None
        names = FileNames(self.names, self.ends)
        return TarRows(root, FileNames(self.tars, self.tar_ends), self.tar_stops, self.members, names)

    def is_same_content(self, row: int, found: os.stat_result) -> bool:
        """Whether size and mtime of the row's file are those of the index. Its owner may have changed, and so ctime."""
        return tuple(self.file[row, :2].tolist()) == times(found)[:2]


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
    in_tars: "FoundInTars | None" = None
    """what the headers of the tars tell; None: the images are not in tars"""


@dataclass(frozen=True)
class FoundInTars:
    """What is known about N rows in tars before their images are read."""

    state: NDArray[np.uint8]
    """[N]: values of State"""
    file: NDArray[np.int64]
    """[N, 3]: size, mtime and ctime of the row's tar"""
    known: NDArray[np.int64]
    """[N]: the row of the same image in the old index; -1: the tar is new or has changed"""


def read(path: Path) -> ImageIndex | None:
    """Opens an index. Returns None if there is none, or if it is damaged or of another version.

    The arrays are mapped into memory, so that the processes of a machine share them.
    """
    found = arrayfile.read(path, _Head)
    if found is None:
        return None
    head, arrays = found
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
    if not TAR_ARRAYS.isdisjoint(arrays):
        count = arrays["tar_ends"].size if "tar_ends" in arrays else 0
        wanted |= {
            "members": (long, (n, 2)),
            "tars": (byte, (arrays["tars"].size,) if "tars" in arrays else ()),
            "tar_ends": (long, (count,)),
            "tar_stops": (long, (count,)),
        }
    if {name: (array.dtype, array.shape) for name, array in arrays.items()} != wanted or n == 0:
        return None
    index = ImageIndex(head, **arrays)  # type: ignore[arg-type]  # the types were compared above
    in_order = _rise(index.ends, len(index.names))
    labelled = _are_labels(index)
    known = index.state.max() <= max(State) and index.sides.min() >= 0
    return index if in_order and labelled and known and _are_tars(index) else None


def _rise(ends: NDArray[np.int64], last: int) -> bool:
    return bool(len(ends) and ends[0] >= 0 and (ends[1:] >= ends[:-1]).all() and ends[-1] == last)


def _are_tars(index: ImageIndex) -> bool:
    """Whether the arrays of tars of an index that was read are valid, if there are any."""
    if index.members is None or index.tars is None or index.tar_ends is None or index.tar_stops is None:
        return True
    rises = _rise(index.tar_ends, len(index.tars)) and _rise(index.tar_stops, len(index))
    return rises and bool(index.members.min() >= 0)


def _are_labels(index: ImageIndex) -> bool:
    """Whether the labels of an index that was read are class ids, or those of captions, which must be valid too."""
    if index.prompts is None or index.prompt_ends is None:
        count = index.head.num_classes
        return count is None or bool(index.labels.min() >= 0 and index.labels.max() < count)
    if index.head.num_classes is not None or not prompts.are_valid(index.prompts, index.prompt_ends):
        return False
    return bool(index.labels.min() >= -max(CaptionFault) and index.labels.max() < len(index.prompt_ends))


def write(path: Path, index: ImageIndex) -> None:
    """Writes an index atomically. Raises RunError if it cannot be written."""
    arrays = {field.name: getattr(index, field.name) for field in fields(index) if field.name != "head"}
    arrayfile.write(path, index.head, {name: value for name, value in arrays.items() if value is not None})


def make(found: FoundImages, old: ImageIndex | None, started: int) -> ImageIndex:
    """Makes the index of a data set. Entries of `old` are reused for unchanged images.

    started: when reading began, before `found` was made, in ns since 1970. Files that are modified after it are read
    again next time.

    Returns `old` itself if nothing has changed.
    """
    rows, n = found.rows, len(found.rows)
    head = _Head(num_classes=found.num_classes, stamp=found.stamp, written=started)
    names = found.files if isinstance(found.files, FileNames) else FileNames.of(map(os.fsencode, found.files))
    tars = rows if isinstance(rows, TarRows) else None
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
        names=names.content,
        ends=names.ends,
        prompts=None if captions is None else captions.prompts.content,
        prompt_ends=None if captions is None else captions.prompts.ends,
        caption_files=None if captions is None else captions.files,
        members=None if tars is None else tars.members,
        tars=None if tars is None else tars.tars.content,
        tar_ends=None if tars is None else tars.tars.ends,
        tar_stops=None if tars is None else tars.stops,
    )
    if found.in_tars is not None:
        index.state[:], index.file[:] = found.in_tars.state, found.in_tars.file
    known, new = _compare(found, old)
    if old is not None and (known >= 0).all() and len(old) == n and _same_set(index, old):
        return old
    if old is not None and (known >= 0).any():
        for name in ("state", "sides", "alpha", "file", "sha256"):
            getattr(index, name)[known >= 0] = getattr(old, name)[known[known >= 0]]
    for row, facts in read_all(rows, new):
        if found.in_tars is not None:
            if facts.state >= State.EMPTY:  # the tar cannot be read here
                index.state[row] = State.UNREAD
                continue
            if facts.file != tuple(index.file[row].tolist()):
                raise RunError(f"{rows.name(row)} changed while the data was indexed; start again once it is complete")
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
        and all(_are_equal(getattr(a, name), getattr(b, name)) for name in CAPTION_ARRAYS | TAR_ARRAYS)
    )


def _are_equal(a: NDArray[np.generic] | None, b: NDArray[np.generic] | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def _compare(found: FoundImages, old: ImageIndex | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The old row of each row that has not changed, or -1, [N]; and the rows to read."""
    n = len(found.rows)
    known = np.full(n, -1)
    if found.in_tars is not None:
        is_unread = found.in_tars.state == State.UNREAD  # in the old index: reading it may succeed now
        known = np.where(is_unread, -1, found.in_tars.known)
        return known, np.flatnonzero((known < 0) & ((found.in_tars.state < State.EMPTY) | is_unread))
    if old is None or old.head.stamp != found.stamp or (found.stamp and len(old) != n):
        return known, np.arange(n)
    where = {old.name(row): row for row in range(len(old))} if not found.stamp else {}
    for row in range(n):
        name, state = found.files[row], found.stats[row]
        before = row if found.stamp else where.get(name)
        if before is not None and (not name or (state is not None and is_settled(old, before, times(state)))):
            known[row] = before
    return known, np.flatnonzero(known < 0)


def is_settled(old: ImageIndex, row: int, state: tuple[int, int, int]) -> bool:
    """Whether the file of a row is as it was when it was read. state: its size, mtime and ctime."""
    return tuple(old.file[row].tolist()) == state and state[1] < old.head.written - SETTLED
