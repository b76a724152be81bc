"""Where encoded images are stored: here, files of a folder; `tables` has those in rows of the `datasets` library."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from distill.core.regular_files import open_regular
from distill.core.text import printable


@dataclass(frozen=True)
class Encoded:
    """An image as it is stored."""

    content: bytes
    file: os.stat_result | None = None
    """state of its file; None: it has none of its own"""


@runtime_checkable
class ImageRows(Protocol):
    """Images by row, 0 to len - 1."""

    def __len__(self) -> int: ...
    def name(self, row: int) -> str: ...  # for messages
    def read(self, row: int) -> Encoded | None: ...  # None: the row holds no image. OSError: it cannot be read


@dataclass(frozen=True)
class FileRows:
    """Files below a folder."""

    root: Path
    count: int
    names: Callable[[int], str]
    """of each row, below root"""

    def __len__(self) -> int:
        return self.count

    def name(self, row: int) -> str:
        """Path and row."""
        return f"{printable(str(self.root / self.names(row)))} (row {row})"

    def read(self, row: int) -> Encoded:
        """The whole file."""
        return read_file(f"{self.root}/{self.names(row)}")


def read_file(path: str) -> Encoded:
    """A regular file; OSError if it is none or cannot be read. Does not wait at a FIFO without a writer."""
    with open_regular(Path(path), follow=True) as file:
        return Encoded(file.readall(), os.fstat(file.fileno()))
