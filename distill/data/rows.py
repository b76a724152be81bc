"""Access to encoded images by row. Here they are files in a folder, or members of tars; `tables` reads them with the
`datasets` library.
"""

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from distill.core.regular_files import open_regular
from distill.core.text import printable

MAX_OPEN = 64  # tars that a process keeps open


@dataclass(frozen=True)
class Encoded:
    """The stored bytes of an image."""

    content: bytes
    file: os.stat_result | None = None
    """stat of the image's file; None: the image has no file of its own"""


@runtime_checkable
class ImageRows(Protocol):
    """Encoded images by row, 0 to len - 1."""

    def __len__(self) -> int: ...
    def name(self, row: int) -> str: ...  # for messages
    def read(self, row: int) -> Encoded | None: ...  # None: the row has no image; raises OSError if it cannot be read


class FileNames(Sequence[str]):
    """N file names in one array. Bytes that are not UTF-8 are surrogates, as in the os module.

    content: [total] uint8, the bytes of all names, concatenated. ends: [N] int64, where each name ends in `content`.
    """

    def __init__(self, content: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.content, self.ends = content, ends

    @classmethod
    def of(cls, names: Iterable[bytes]) -> "FileNames":
        parts = list(names)
        ends = np.fromiter(map(len, parts), np.int64, len(parts)).cumsum()
        return cls(np.frombuffer(b"".join(parts), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]  # raises IndexError
        start = int(self.ends[row - 1]) if row else 0
        return os.fsdecode(self.content[start : int(self.ends[row])].tobytes())


class UsableRows:
    """The rows 0 ... count - 1 of a data set, without those that cannot be used. Only the latter take memory.

    unusable: [m] int64, rising.
    """

    def __init__(self, count: int, unusable: NDArray[np.int64]) -> None:
        self.unusable, self._length = unusable, count - len(unusable)
        self._usable_before = unusable - np.arange(len(unusable))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        """The row of the usable item `index`, 0 to len - 1."""
        return index + int(np.searchsorted(self._usable_before, index, "right"))

    def before(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many usable rows come before each of these rows, [n]."""
        return rows - np.searchsorted(self.unusable, rows)


@dataclass(frozen=True)
class FileRows:
    """Image files in a folder and its sub-folders."""

    root: Path
    count: int
    names: Callable[[int], str]
    """row -> path of its file, relative to root"""

    def __len__(self) -> int:
        return self.count

    def name(self, row: int) -> str:
        """The path and the row number."""
        return f"{printable(str(self.root / self.names(row)))} (row {row})"

    def read(self, row: int) -> Encoded:
        """Reads the file. Raises OSError if it cannot be read."""
        return read_file(f"{self.root}/{self.names(row)}")


def read_file(path: str) -> Encoded:
    """Reads a regular file. Raises OSError for anything else, without blocking on a FIFO that has no writer."""
    with open_regular(Path(path), follow=True) as file:
        return Encoded(file.readall(), os.fstat(file.fileno()))


@dataclass(frozen=True)
class TarRows:
    """Images in N members of T tars, which are read at their offsets."""

    root: Path
    tars: FileNames
    """[T]: path of each tar, relative to root"""
    stops: NDArray[np.int64]
    """[T]: where the rows of each tar end"""
    members: NDArray[np.int64]
    """[N, 2]: offset and size of each image in bytes"""
    names: FileNames
    """[N]: name of each member; empty: the row stands for the tar itself"""

    def __len__(self) -> int:
        return len(self.members)

    def name(self, row: int) -> str:
        """The path of the tar, the name in the tar and the row number."""
        member = self.names[row]
        return printable(f"{self._tar(row)}{': ' if member else ''}{member}") + f" (row {row})"

    def read(self, row: int) -> Encoded:
        """Reads the image. Raises OSError if the tar cannot be read."""
        path, (offset, size) = self._tar(row), self.members[row].tolist()
        file = _OPEN.get(path)
        found, content = os.fstat(file.fileno()), b""
        while len(content) < size:
            # An index of others may give any size, for which no memory must be reserved.
            is_inside = offset + size <= found.st_size
            block = os.pread(file.fileno(), size - len(content), offset + len(content)) if is_inside else b""
            if not block:
                raise OSError(errno.ENODATA, "it ends before the end of this image", path)
            content += block
        return Encoded(content, found)

    def _tar(self, row: int) -> str:
        return str(self.root / self.tars[int(np.searchsorted(self.stops, row, "right"))])


class _OpenFiles:
    """The files used last, which stay open. Threads may share it: a file is closed only when nobody uses it any more.

    After a fork, the new process opens its own files.
    """

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock, self._files = Lock(), OrderedDict[str, FileIO]()

    def get(self, path: str) -> FileIO:
        """The open file. Raises OSError if it is not a regular file or cannot be opened."""
        with self._lock:
            if path in self._files:
                self._files.move_to_end(path)
                return self._files[path]
        file = open_regular(Path(path), follow=True)
        with self._lock:
            self._files[path] = file
            while len(self._files) > MAX_OPEN:
                self._files.popitem(last=False)
        return file


_OPEN = _OpenFiles()
