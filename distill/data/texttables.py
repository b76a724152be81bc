"""Reads the rows of tables with texts: JSON Lines, CSV and parquet. Each row is a mapping with its place in messages.

Texts are given as they are stored: as bytes where they may be invalid UTF-8. See `prompts.cleaned`.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from enum import Enum
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

from distill.core.errors import InputError
from distill.core.regular_files import open_regular
from distill.core.text import one_line, printable

BATCH = 4096  # rows of a parquet file that are read together
SAMPLE = 1000  # first objects of JSON Lines, whose keys are the columns


class TableRow(NamedTuple):
    """A row of a table."""

    place: str  # "line 3" or "row 2", for messages
    values: dict[str, object]


def rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[TableRow]:
    """Yields the rows of a .jsonl, .csv or .parquet file. columns: of a parquet file, those to read; None: all.

    Raises InputError if the file cannot be read as its suffix says.
    """
    match path.suffix.lower():
        case ".jsonl":
            yield from _json_lines(path)
        case ".csv":
            yield from _csv(path)
        case _:
            yield from _parquet(path, columns)


class Holds(Enum):
    """What the values of a column are, apart from nulls."""

    TEXTS = "texts"
    NOTHING = "nothing"
    MIXED = "texts and others"
    OTHERS = "others"


def columns_of(path: Path) -> dict[str, Holds]:
    """The columns of a table, and what they hold. For JSON Lines, they are the keys and values of the first 1,000
    objects.

    Raises InputError if the file cannot be read as its suffix says.
    """
    match path.suffix.lower():
        case ".jsonl":
            return _columns_of_json_lines(path)
        case ".csv":
            return dict.fromkeys(_columns_of_csv(path), Holds.TEXTS)
    return _columns_of_parquet(path)


def lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a file, without line breaks. Raises InputError if it cannot be read."""
    try:
        with closing(io.BufferedReader(open_regular(path, follow=True), 2**20)) as file:
            for line in file:
                yield line.removesuffix(b"\n").removesuffix(b"\r")
    except OSError as error:
        raise InputError(f"{printable(str(path))} cannot be read: {error.strerror}") from error


def stored(value: object) -> bytes | str | None:
    """A text of a row as it is stored; NOT_UTF8 for a str with surrogates, which stand for invalid bytes.

    Raises TypeError for anything that is not a text.
    """
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    return value if value.isascii() or _is_encodable(value) else NOT_UTF8


NOT_UTF8 = b"\xff"


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_lines(path: Path) -> Iterator[TableRow]:
    for number, line in enumerate(lines(path), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{printable(str(path))}, line {number}: is not JSON ({one_line(str(error))}); correct the line"
            ) from error
        if not isinstance(values, dict):
            raise InputError(f'{printable(str(path))}, line {number}: is not a JSON object, like {{"text": ...}}')
        yield TableRow(f"line {number}", values)


def _columns_of_json_lines(path: Path) -> dict[str, Holds]:
    found: dict[str, Holds] = {}
    for row in islice(_json_lines(path), SAMPLE):
        for key, value in row.values.items():
            before = found.setdefault(key, Holds.NOTHING)
            if value is not None:
                now = Holds.TEXTS if isinstance(value, str) else Holds.OTHERS
                found[key] = now if before in (Holds.NOTHING, now) else Holds.MIXED
    return found


def _csv(path: Path) -> Iterator[TableRow]:
    found = _csv_lines(path)
    _, header = next(found, (1, []))
    for number, values in found:
        if not values:
            continue
        if len(values) != len(header):
            raise InputError(
                f"{printable(str(path))}, line {number}: has {len(values)} values, but there are {len(header)} "
                "columns; put values with commas in double quotes"
            )
        yield TableRow(f"line {number}", dict(zip(header, values, strict=True)))


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of each line (the last one, if it has several) and its values; first the names of columns."""
    encodings = chain(["utf-8-sig"], repeat("utf-8"))
    decoded = (line.decode(each, "surrogateescape") + "\n" for each, line in zip(encodings, lines(path), strict=False))
    reader = csv.reader(decoded, strict=True)
    try:
        yield reader.line_num, [name.strip() for name in next(reader, [])]
        for values in reader:
            yield reader.line_num, values
    except csv.Error as error:
        raise InputError(
            f"{printable(str(path))}, line {reader.line_num}: is not CSV ({error}); correct the line"
        ) from error


def _columns_of_csv(path: Path) -> list[str]:
    _, header = next(_csv_lines(path))
    return header


# --- parquet ---


@contextmanager
def _readable_parquet(path: Path) -> Iterator[None]:
    """Context manager: converts errors of pyarrow to an InputError. Raises one for anything but a regular file."""
    import pyarrow as pa

    try:
        open_regular(path, follow=True).close()  # a FIFO would block
    except OSError as error:
        raise InputError(f"{printable(str(path))} cannot be read: {error.strerror}") from error
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{printable(str(path))} cannot be read as parquet: {one_line(str(error))}") from error


def _parquet(path: Path, columns: Sequence[str] | None) -> Iterator[TableRow]:
    from pyarrow import parquet

    number = 0
    with _readable_parquet(path), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH, columns=columns):
            names = batch.schema.names
            for values in zip(*map(decoded, batch.columns), strict=True):
                yield TableRow(f"row {number}", dict(zip(names, values, strict=True)))
                number += 1


def decoded(column: Any) -> list[Any]:
    """The values of a column of pyarrow, with texts as bytes, because pyarrow does not check that they are UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    texts = column.cast(pa.large_binary()) if is_text_type(column.type) else column
    return list(texts.to_pylist())


def is_text_type(kind: Any) -> bool:
    """Whether a column of this type of pyarrow has texts."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _columns_of_parquet(path: Path) -> dict[str, Holds]:
    from pyarrow import parquet

    with _readable_parquet(path), parquet.ParquetFile(path) as file:
        return {each.name: Holds.TEXTS if is_text_type(each.type) else Holds.OTHERS for each in file.schema_arrow}
