"""The index of files with latents: their checksums, numbers of samples and labels, computed once for all runs.

Headers are read first, so that files that do not fit are found before gigabytes are read for the checksums. Indexes are
kept like those of images (see `index`): in STORE/indexes for later runs, in RUN/indexes for the ranks and stages of one
run. A file whose size and timestamps have not changed is not read again. Other users may have written the indexes of a
store, so every index is validated, and an invalid one is replaced.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from distill.core.errors import InputError
from distill.core.regular_files import open_regular
from distill.core.text import printable
from distill.data import arrayfile
from distill.data.latent_files import FileFacts, facts_of, labels_of_file, listed
from distill.runs.progress import Progress
from distill.spec.imagefolder import ALWAYS, MAX_CLASSES, PER_IMAGE
from distill.spec.model import LatentsData

MAX_COUNT = 2**40  # maximum number of samples in a file
THREADS = 16  # threads that read files, because network file systems serve many requests at once
TASK = 32  # small files that a thread reads per task
CHUNK = THREADS * TASK * 8  # files that are submitted together
BLOCK = 1 << 22  # bytes that are read at once
SHOWN = 5  # maximum number of names in a message
SETTLED = 2 * 10**9  # see `index.SETTLED`
LONG = 1 << 30  # bytes; checksums of more show their progress
MEGABYTE = 10**6

T = TypeVar("T")


class _Head(BaseModel):
    """The metadata of an index, stored beside its arrays."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    shape: tuple[int, ...] = Field(min_length=1, max_length=4)
    """of one sample as it is stored"""
    key: str
    """name of the tensor; empty: .npy files"""
    num_classes: int | None = Field(ge=1, le=MAX_CLASSES)
    written: int
    """when indexing started, in nanoseconds since 1970"""


@dataclass(frozen=True)
class LatentIndex:
    """The index of F files with N samples, which are numbered in the order of the files."""

    head: _Head
    counts: NDArray[np.int64]  # [F]: samples in each file
    file: NDArray[np.int64]  # [F, 3]: size in bytes, mtime and ctime in ns since 1970
    sha256: NDArray[np.uint8]  # [F, 32]
    labels: NDArray[np.int64]  # [N], or [0] if there are none
    names: NDArray[np.uint8]  # the bytes of all file names, relative to the folder, concatenated
    ends: NDArray[np.int64]  # [F]: where each file name ends in `names`

    def __len__(self) -> int:
        return len(self.counts)

    def name(self, file: int) -> str:
        """The path of a file, relative to the folder; empty: data.path is the file."""
        start = int(self.ends[file - 1]) if file else 0
        return os.fsdecode(self.names[start : int(self.ends[file])].tobytes())


def read(path: Path) -> LatentIndex | None:
    """Reads an index. Returns None if there is none, or if it is damaged or of another version."""
    found = arrayfile.read(path, _Head)
    if found is None or "counts" not in found[1]:
        return None
    head, arrays = found
    files, counts = arrays["counts"].size, arrays["counts"]
    byte, long = np.dtype(np.uint8), np.dtype(np.int64)
    if not files or counts.dtype != long or counts.min() < 0 or counts.max() > MAX_COUNT:
        return None
    wanted = {
        "counts": (long, (files,)),
        "file": (long, (files, 3)),
        "sha256": (byte, (files, 32)),
        "labels": (long, (int(counts.sum()) if head.num_classes else 0,)),
        "names": (byte, (arrays["names"].size,) if "names" in arrays else ()),
        "ends": (long, (files,)),
    }
    if {name: (array.dtype, array.shape) for name, array in arrays.items()} != wanted or not counts.sum():
        return None
    index = LatentIndex(head, **arrays)  # type: ignore[arg-type]  # the types were compared above
    in_order = index.ends[0] >= 0 and (np.diff(index.ends) >= 0).all() and index.ends[-1] == len(index.names)
    labelled = head.num_classes is None or (index.labels.min() >= 0 and index.labels.max() < head.num_classes)
    return index if in_order and labelled else None


def write(path: Path, index: LatentIndex) -> None:
    """Writes an index atomically. Raises RunError if it cannot be written."""
    arrayfile.write(path, index.head, {name: value for name, value in vars(index).items() if name != "head"})


def make(spec: LatentsData, old: LatentIndex | None) -> LatentIndex:
    """Makes the index of a data set. Entries of `old` are reused for unchanged files.

    Returns `old` itself if nothing has changed. InputError if files cannot be used, or have different shapes.
    """
    written = time.time_ns()
    names, states = listed(spec)
    known = {} if old is None else _known(old, names, states)
    new = [number for number in range(len(names)) if number not in known]
    facts = _facts(spec, names, new)
    shape, key = _agreed(spec, names, facts, old if known else None)
    counts = np.zeros(len(names), np.int64)
    counts[new] = [facts[number].count for number in new]
    sha256 = np.zeros((len(names), 32), np.uint8)
    if old is not None and known:
        ours, theirs = np.array(list(known)), np.array(list(known.values()))
        counts[ours], sha256[ours] = old.counts[theirs], old.sha256[theirs]
    if not counts.sum():
        raise InputError(f"data.path={printable(spec.path)} contains no samples; give files with latents")
    labels = _labels(spec, names, counts, facts, old, known)
    num_classes = None if labels is None else _count_classes(spec, labels)
    encoded = [os.fsencode(name) for name in names]
    for number, digest in _checksums(spec, names, states, new):
        sha256[number] = np.frombuffer(digest, np.uint8)
    index = LatentIndex(
        _Head(shape=shape, key=key, num_classes=num_classes, written=written),
        counts=counts,
        file=states,
        sha256=sha256,
        labels=np.empty(0, np.int64) if labels is None else labels,
        names=np.frombuffer(b"".join(encoded), np.uint8),
        ends=np.cumsum([len(each) for each in encoded], dtype=np.int64),
    )
    return old if old is not None and not new and _is_same(index, old) else index


def _is_same(a: LatentIndex, b: LatentIndex) -> bool:
    heads = (each.head.model_copy(update={"written": 0}) for each in (a, b))
    return len(set(heads)) == 1 and all(
        np.array_equal(getattr(a, n), getattr(b, n)) for n in ("ends", "names", "labels")
    )


def _times(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _known(old: LatentIndex, names: Sequence[str], states: NDArray[np.int64]) -> dict[int, int]:
    """The unchanged files: number now -> number in the old index."""
    where = {old.name(number): number for number in range(len(old))}
    found = ((number, where[name]) for number, name in enumerate(names) if name in where)
    return {
        number: before
        for number, before in found
        if np.array_equal(states[number], old.file[before]) and states[number, 1] < old.head.written - SETTLED
    }


def _facts(spec: LatentsData, names: Sequence[str], new: Sequence[int]) -> dict[int, FileFacts]:
    """What the headers of the files `new` say. InputError that names the files that cannot be used."""
    faults: list[str] = []

    def one(number: int) -> FileFacts | None:
        try:
            return facts_of(spec, names[number])
        except InputError as error:
            faults.append(str(error))
            return None

    found = dict(zip(new, _in_threads(one, new), strict=True))
    if len(faults) == 1:
        raise InputError(faults[0])
    if faults:
        more = f"; ... and {len(faults) - SHOWN} others" if len(faults) > SHOWN else ""
        listed = "; ".join(sorted(faults)[:SHOWN])
        raise InputError(f"{len(faults)} of {len(names)} files of data.path={printable(spec.path)}: {listed}{more}")
    return {number: each for number, each in found.items() if each is not None}


def _agreed(
    spec: LatentsData, names: Sequence[str], facts: Mapping[int, FileFacts], old: LatentIndex | None
) -> tuple[tuple[int, ...], str]:
    """The shape of a sample, and the name of its tensor. InputError unless they are the same in all files."""
    first = (
        (old.head.shape, old.head.key) if old is not None else next((each.shape, each.key) for each in facts.values())
    )
    other = [number for number, each in facts.items() if (each.shape, each.key) != first]
    if other:
        shown = ", ".join(f"{printable(names[n])} {list(facts[n].shape)}" for n in other[:SHOWN])
        raise InputError(
            f"data.path={printable(spec.path)}: {len(other)} of {len(names)} files have samples of another shape than "
            f"{list(first[0])}, the shape of the others: {shown}{', ...' if len(other) > SHOWN else ''}; give latents "
            "of one shape"
        )
    return first


def _labels(
    spec: LatentsData,
    names: Sequence[str],
    counts: NDArray[np.int64],
    facts: Mapping[int, FileFacts],
    old: LatentIndex | None,
    known: Mapping[int, int],
) -> NDArray[np.int64] | None:
    """The class id of each sample; None: there are none."""
    if spec.labels is None:
        return None
    if (found := labels_of_file(spec, int(counts.sum()))) is not None:
        return found
    starts = np.zeros(0, np.int64) if old is None else np.concatenate([[0], old.counts.cumsum()])
    parts = []
    for number in range(len(names)):
        if number in known:
            assert old is not None
            before = known[number]
            parts.append(old.labels[starts[before] : starts[before + 1]])
        else:
            own = facts[number].labels
            assert own is not None, "facts_of reads them"
            parts.append(own)
    return np.concatenate(parts)


def _count_classes(spec: LatentsData, labels: NDArray[np.int64]) -> int:
    """The highest class id + 1. InputError if an id is negative or implausibly high."""
    low, high = int(labels.min()), int(labels.max())
    most = min(MAX_CLASSES, max(ALWAYS, PER_IMAGE * len(labels)))
    if low < 0 or high >= most:
        raise InputError(
            f"data.labels={printable(spec.labels or '')}: {len(labels)} samples have class ids from {low} to {high}; "
            f"valid: 0 to {most - 1} (the number of classes is the highest id + 1); number the classes 0, 1, 2 ..."
        )
    return high + 1


def _checksums(
    spec: LatentsData, names: Sequence[str], states: NDArray[np.int64], new: Sequence[int]
) -> list[tuple[int, bytes]]:
    """The SHA-256 of each of these files. They are read by several threads, with progress if they are large."""
    total = int(states[list(new), 0].sum())
    progress = Progress("checksums of the latents", -(-total // MEGABYTE), "MB", None) if total > LONG else None
    stop, lock, done = threading.Event(), threading.Lock(), 0

    def count(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            if progress is not None:
                progress.update(done // MEGABYTE, {})

    def one(number: int) -> bytes:
        return _sha256(Path(spec.path, names[number]), states[number], count, stop)

    with progress or nullcontext():
        return list(zip(new, _in_threads(one, new, stop), strict=True))


def _in_threads(work: Callable[[int], T], numbers: Sequence[int], stop: threading.Event | None = None) -> Iterator[T]:
    """Yields the result of `work` for each number, in their order. Several threads do the work.

    stop: is set in the end, also after an exception or Ctrl-C, before the threads are waited for.
    """

    def task(part: Sequence[int]) -> list[T]:
        return [work(number) for number in part]

    with ThreadPoolExecutor(THREADS) as pool, ExitStack() as ending:
        if stop is not None:
            ending.callback(stop.set)
        for start in range(0, len(numbers), CHUNK):
            chunk = numbers[start : start + CHUNK]
            size = max(1, min(TASK, len(chunk) // THREADS))
            for found in pool.map(task, [chunk[i : i + size] for i in range(0, len(chunk), size)]):
                yield from found


def _sha256(path: Path, state: NDArray[np.int64], count: Callable[[int], None], stop: threading.Event) -> bytes:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK))
    try:
        with open_regular(path, follow=True) as file:
            while not stop.is_set() and (size := file.readinto(buffer)):
                digest.update(buffer[:size])
                count(size)
            now = _times(os.fstat(file.fileno()))
    except OSError as error:
        raise InputError(f"{printable(str(path))} cannot be read: {error.strerror}") from error
    if now != tuple(state.tolist()):
        raise InputError(f"{printable(str(path))} changed while it was read; wait until it is complete")
    return digest.digest()
