"""The index of a stream of parquet files: their row groups, and the class ids or captions of their rows.

To make an index, the end of each file is read, which tells its row groups, and the column of labels. Images are not
read. An index of a hub id names the commit that is read from then on. It is stored and validated like the index of
images (see `index`): one in the store, for later runs, and one in each run.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from distill.data import arrayfile, prompts
from distill.data.prompts import CaptionFault, Prompts
from distill.data.rows import FileNames
from distill.spec.imagefolder import MAX_CLASSES


class _StreamHead(BaseModel):
    """The metadata of an index, stored beside its arrays."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1, 2] = 2
    """1: with a limit and several files, rows may be listed in other files than they are in"""
    commit: str | None = Field(pattern=r"\A[0-9a-f]{40}\z")
    """of a hub id"""
    num_classes: int | None = Field(ge=1, le=MAX_CLASSES)
    count: int = Field(ge=1)
    """N, the number of rows that are used: the first ones"""
    content: str = Field(pattern=r"\A[0-9a-f]{64}\z")
    """SHA-256 over what identifies the row groups of the files that are used: the size of each file, the size of its
    footer, and the number of rows and bytes of each row group"""


@dataclass(frozen=True)
class StreamIndex:
    """N rows in G row groups of F files. Row groups without rows are left out."""

    head: _StreamHead
    names: NDArray[np.uint8]  # the bytes of the names of all files, concatenated
    ends: NDArray[np.int64]  # [F]: where each name ends in `names`
    sizes: NDArray[np.int64]  # [F], in bytes
    groups: NDArray[np.int64]  # [G, 2]: file of each row group, and its number in the file
    stops: NDArray[np.int64]  # [G]: where the rows of each row group end; the last may be higher than N
    labels: NDArray[np.int64]  # [N] class ids, or labels of captions as in `prompts.Captions`; [0] if unconditional
    prompts: NDArray[np.uint8]  # the bytes of all different captions, concatenated; [0]: there are none
    prompt_ends: NDArray[np.int64]  # where each caption ends in `prompts`

    def __len__(self) -> int:
        return self.head.count

    @property
    def files(self) -> FileNames:
        """The names of the files, as `streams` opens them."""
        return FileNames(self.names, self.ends)

    @cached_property
    def captions(self) -> Prompts | None:
        """The different captions; None: the data has none."""
        return Prompts(self.prompts, self.prompt_ends) if len(self.prompt_ends) else None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that identifies the rows."""
        head = json.dumps([self.head.commit, self.head.content, self.head.num_classes, len(self)])
        content = hashlib.sha256(head.encode())
        for array in (self.names, self.groups, self.stops, self.labels, self.prompts, self.prompt_ends):
            content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()


def head(commit: str | None, num_classes: int | None, count: int, content: str) -> _StreamHead:
    return _StreamHead(commit=commit, num_classes=num_classes, count=count, content=content)


def encoded(index: StreamIndex) -> bytes:
    """The content of the file of an index."""
    return arrayfile.encoded(index.head, _arrays(index))


def write(path: Path, index: StreamIndex) -> None:
    """Writes an index atomically. Raises RunError if it cannot be written."""
    arrayfile.write(path, index.head, _arrays(index))


def _arrays(index: StreamIndex) -> arrayfile.Arrays:
    return {field.name: getattr(index, field.name) for field in fields(index) if field.name != "head"}


def read(path: Path) -> StreamIndex | None:
    """Reads an index. Returns None if there is none, or if it is damaged or of another version."""
    found = arrayfile.read(path, _StreamHead)
    if found is None or found[1].keys() != {each.name for each in fields(StreamIndex)} - {"head"}:
        return None
    head, arrays = found
    return _valid(head, arrays)


def _valid(head: _StreamHead, arrays: Mapping[str, NDArray[np.generic]]) -> StreamIndex | None:
    byte, long = np.dtype(np.uint8), np.dtype(np.int64)
    f, g, captioned = arrays["ends"].size, arrays["stops"].size, arrays["prompt_ends"].size > 0
    labelled = captioned or head.num_classes is not None
    wanted = {
        "names": (byte, (arrays["names"].size,)),
        "ends": (long, (f,)),
        "sizes": (long, (f,)),
        "groups": (long, (g, 2)),
        "stops": (long, (g,)),
        "labels": (long, (head.count if labelled else 0,)),
        "prompts": (byte, (arrays["prompts"].size,)),
        "prompt_ends": (long, (arrays["prompt_ends"].size,)),
    }
    if {name: (array.dtype, array.shape) for name, array in arrays.items()} != wanted or not f or not g:
        return None
    index = StreamIndex(head, **arrays)  # type: ignore[arg-type]  # the types were compared above
    names = index.ends[0] >= 0 and (np.diff(index.ends) >= 0).all() and index.ends[-1] == len(index.names)
    rows = index.stops[0] > 0 and (np.diff(index.stops) > 0).all() and index.stops[-1] >= head.count
    groups = index.groups.min() >= 0 and index.groups[:, 0].max() < f
    if not (names and rows and groups and prompts.are_valid(index.prompts, index.prompt_ends)):
        return None
    if captioned and head.num_classes is not None:
        return None
    low, high = (-max(CaptionFault), len(index.prompt_ends)) if captioned else (0, head.num_classes or 0)
    return index if not labelled or low <= index.labels.min() <= index.labels.max() < high else None


def of(
    head: _StreamHead,
    files: Sequence[tuple[str, int]],
    groups: Sequence[tuple[int, int, int]],
    labels: NDArray[np.int64] | None,
    captions: Prompts | None,
) -> StreamIndex:
    """files: (name, bytes) of each. groups: (file, number in the file, rows) of each row group. labels: [N]."""
    names = FileNames.of(name.encode() for name, _ in files)
    table = np.array(groups, np.int64).reshape(-1, 3)
    none = Prompts.of(())
    return StreamIndex(
        head,
        names.content,
        names.ends,
        np.array([size for _, size in files], np.int64),
        np.ascontiguousarray(table[:, :2]),
        table[:, 2].cumsum(),
        np.empty(0, np.int64) if labels is None else labels,
        (captions or none).content,
        (captions or none).ends,
    )
