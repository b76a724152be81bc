"""Access to encoded images by row. Here they are files in a folder; `tables` reads them with the `datasets` library."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from distill.core.regular_files import open_regular
from distill.core.text import printable


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
