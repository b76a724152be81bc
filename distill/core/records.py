"""Files that may be damaged, read with care: regular files only, of bounded size, validated by a schema.

A FIFO would wait forever and a device may have no end; neither is a file of a run.
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

SMALL = 16 * 2**20  # bytes that a file read whole may have
LINE = 2**20  # bytes of a line; a longer one is no event
SHOWN = 60  # letters of a value in a message
NOT_JSON = "json_invalid"  # pydantic's name for that mistake

T = TypeVar("T")


def open_regular(path: Path) -> FileIO:
    """A regular file, open for reading; FileNotFoundError where there is none, InputError where it cannot be read."""
    try:
        return regular_files.open_regular(path, follow=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        remedy = "; remove it" if error.errno == errno.EINVAL else ""  # a folder, FIFO or device
        raise InputError(f"{path} cannot be read: {error.strerror}{remedy}") from None


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """A regular file of at most `limit` bytes, whole; errors as of `open_regular`, and InputError if it is larger."""
    try:
        return regular_files.read_regular(path, limit, follow=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def read_text(path: Path) -> str:
    """A small text file; what is no UTF-8 in it is shown as U+FFFD."""
    return read_small(path).decode(errors="replace")


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Parsed JSON of a small file that must exist; InputError if it is no JSON."""
    try:
        return json.loads(read_small(path))
    except InputError:
        raise
    except (ValueError, RecursionError):  # nested too deep, too
        raise InputError(f"{path} cannot be used: it is not JSON") from None


class Schema(Generic[T]):
    """What a JSON text must hold: a model, a dataclass or a union of them, its types taken strictly."""

    def __init__(self, shape: Any) -> None:  # noqa: ANN401  (unions have no type of their own)
        self._adapter: Any = TypeAdapter(shape)

    def parse(self, content: bytes) -> T:
        """The value of a JSON text; pydantic's ValidationError if it does not fit."""
        value: T = self._adapter.validate_json(content, strict=True)
        return value


def load(path: Path, schema: Schema[T], remedy: str, limit: int = SMALL) -> T:
    """What a small JSON file holds; FileNotFoundError if it is missing, InputError if it does not fit the schema.

    remedy: what to do then, the end of the message.
    """
    try:
        return schema.parse(read_small(path, limit))
    except ValidationError as error:
        raise InputError(f"{path} cannot be used: {mistake(error)}; {remedy}") from None


def mistake(error: ValidationError) -> str:
    """The first mistake that a schema found, in words: where, what was given, what is valid."""
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
    """The entries of a folder by name; empty if it does not exist. InputError if it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None


def lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file that is read in blocks, without those of more than `LINE` bytes; memory is bounded."""
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
