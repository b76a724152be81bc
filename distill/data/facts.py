"""Facts about encoded images, which the index keeps: state, size, checksum. Each image is read once for them."""

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial

import numpy as np
from numpy.typing import NDArray

from distill.data.decoding import UNREADABLE, header
from distill.data.rows import FileRows, ImageRows, TarRows

THREADS = 16  # threads that read files, because network file systems serve many requests at once
TASK = 32  # files that a thread reads per task
CHUNK = THREADS * TASK * 8  # rows that are submitted together


class State(IntEnum):
    """Whether an image can be used, and if not, why. From EMPTY on, the image has no bytes."""

    FINE = 0
    BROKEN = 1
    """its header cannot be read"""
    EMPTY = 2
    """the row has no image"""
    MISSING = 3
    DENIED = 4
    UNREAD = 5
    """not a regular file, or a read error, which for an image in a tar is any error"""
    # In a tar:
    NO_IMAGE = 6
    SEVERAL_IMAGES = 7
    LINK = 8
    REPEATED = 9
    NO_CLASS = 10
    CUT = 11
    """from here on, the row stands for damage to the tar itself"""
    BAD_HEADER = 12
    NO_SAMPLES = 13


REASONS = {
    State.MISSING: "no such file",
    State.DENIED: "no permission to read it",
    State.UNREAD: "not a regular file, or a read error",
    State.NO_IMAGE: "no image",
    State.SEVERAL_IMAGES: "several images",
    State.LINK: "a link or a sparse file, which is not read",
    State.REPEATED: "its key occurs again in the tar",
    State.NO_CLASS: "no class id",
    State.CUT: "the tar is cut",
    State.BAD_HEADER: "a header of the tar is broken",
    State.NO_SAMPLES: "the tar has no samples",
}


@dataclass(frozen=True)
class ImageFacts:
    """What is known about an image."""

    state: State
    sides: tuple[int, int] = (0, 0)
    alpha: bool = False
    file: tuple[int, int, int] = (0, 0, 0)
    sha256: bytes = bytes(32)


def times(found: os.stat_result) -> tuple[int, int, int]:
    """Size in bytes, mtime and ctime in ns since 1970."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_all(rows: ImageRows, wanted: NDArray[np.int64]) -> Iterator[tuple[int, ImageFacts]]:
    """Yields each of the rows `wanted` with its facts. Files are read by several threads."""
    if not isinstance(rows, FileRows | TarRows):
        yield from ((row, _facts_of(rows, row)) for row in wanted.tolist())
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(wanted), CHUNK):
            tasks = [wanted[i : i + TASK].tolist() for i in range(start, min(start + CHUNK, len(wanted)), TASK)]
            for task, facts in zip(tasks, pool.map(partial(_task, rows), tasks), strict=True):
                yield from zip(task, facts, strict=True)


def _task(rows: ImageRows, part: Sequence[int]) -> list[ImageFacts]:
    return [_facts_of(rows, row) for row in part]


def _facts_of(rows: ImageRows, row: int) -> ImageFacts:
    try:
        found = rows.read(row)
    except OSError as error:
        known = {errno.ENOENT: State.MISSING, errno.ENOTDIR: State.MISSING, errno.ELOOP: State.MISSING}
        known |= {errno.EACCES: State.DENIED, errno.EPERM: State.DENIED}
        return ImageFacts(known.get(error.errno or 0, State.UNREAD))
    if found is None:
        return ImageFacts(State.EMPTY)
    facts = _of_bytes(found.content)
    file = times(found.file) if found.file is not None else (0, 0, 0)
    return replace(facts, file=file, sha256=hashlib.sha256(found.content).digest())


def _of_bytes(content: bytes) -> ImageFacts:
    try:
        head = header(content)
    except UNREADABLE:
        return ImageFacts(State.BROKEN)
    return ImageFacts(State.FINE, (head.height, head.width), head.alpha)
