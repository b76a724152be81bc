"""Safe reading of files that may be damaged: regular files only, of limited size, validated by a schema.

Reading a FIFO may block forever and a device may be endless, so both are refused.
"""

import errno
import json
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from distill.core import regular_files
from distill.core.errors import InputError
from distill.core.text import one_line

SMALL = 16 * 2**20  # bytes: the default limit for a file that is read as a whole
LINE = 2**20  # bytes: the longest line that is kept in memory
SHOWN = 60  # characters of a value that a message shows
NOT_JSON = "json_invalid"  # pydantic's error type for text that is not JSON

T = TypeVar("T")


def open_regular(path: Path) -> FileIO:
    """Open a regular file for reading.

    Raises FileNotFoundError if it does not exist, and InputError if it is not a regular file or cannot be opened.
    """
    try:
        return regular_files.open_regular(path, follow=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        remedy = "; delete it" if error.errno == errno.EINVAL else ""  # a folder, FIFO or device
        raise InputError(f"{path} cannot be read: {error.strerror}{remedy}") from None


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """The content of a regular file. Raises like `open_regular`, and InputError if it has more than `limit` bytes."""
    try:
        return regular_files.read_regular(path, limit, follow=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def read_text(path: Path) -> str:
    """The content of a small text file. Bytes that are not UTF-8 are replaced by U+FFFD."""
    return read_small(path).decode(errors="replace")


def read_json(path: Path) -> Any:  # noqa: ANN401
    """The parsed content of a small JSON file. FileNotFoundError if it is missing, InputError if it is not JSON."""
    try:
        return json.loads(read_small(path))
    except InputError:
        raise
    except (ValueError, RecursionError):  # RecursionError: too deeply nested
        raise InputError(f"{path} cannot be used: it is not JSON") from None


class Schema(Generic[T]):
    """The schema of a JSON text: a model, a dataclass or a union of them. Types are not converted (strict mode)."""

    def __init__(self, shape: Any) -> None:  # noqa: ANN401  (unions have no type of their own)
        self._adapter: Any = TypeAdapter(shape)

    def parse(self, content: bytes) -> T:
        """Parse and validate a JSON text. Raises pydantic's ValidationError if it does not match the schema."""
        value: T = self._adapter.validate_json(content, strict=True)
        return value


def load(path: Path, schema: Schema[T], remedy: str, limit: int = SMALL) -> T:
    """Read and validate a small JSON file.

    Raises FileNotFoundError if it is missing, and InputError if it cannot be read or does not match the schema.

    remedy: the end of the message for a mismatch: what the user can do.
    """
    try:
        return schema.parse(read_small(path, limit))
    except ValidationError as error:
        raise InputError(f"{path} cannot be used: {mistake(error)}; {remedy}") from None


def mistake(error: ValidationError) -> str:
    """The first mistake of a validation error in words: the field, the given value, and what is valid."""
    first = error.errors(include_url=False)[0]
    if first["type"] == NOT_JSON:
        return "it is not JSON"
    where = one_line(".".join(map(str, first["loc"])), 100)
    prefix = f"{where}: " if where else ""
    if first["type"] == "missing":
        return f"{prefix}is missing"
    given = json.dumps(first["input"], default=str)
    given = given if len(given) <= SHOWN else given[: SHOWN - 3] + "..."
    message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    return f"{prefix}{given} given; {one_line(message[:1].lower() + message[1:], 300)}"


def names(folder: Path) -> list[str]:
    """The sorted names in a folder; empty if there is no such folder. InputError if it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None


def lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file that is read in blocks. Lines of more than `LINE` bytes are skipped, to limit memory."""
    rest = b""
    skipping = False
    for part in blocks:
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            if not skipping:
                yield line
            skipping = False
        if len(rest) > LINE:
            rest, skipping = b"", True
    if rest and not skipping:
        yield rest
