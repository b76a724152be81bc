"""Reads the rows of tables with texts: JSON Lines, CSV and parquet. Each row is a mapping with its place in messages.

Texts are given as they are stored: as bytes where they may be invalid UTF-8. See `prompts.cleaned`.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from distill.core.errors import InputError
from distill.core.regular_files import open_regular
from distill.core.text import one_line, printable

BATCH = 4096  # rows of a parquet file that are read together


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


def columns_of(path: Path) -> dict[str, bool]:
    """The columns of a table, and whether each has texts. For JSON Lines, they are the keys of the first object, and
    its null values count as texts if it has no others.

    Raises InputError if the file cannot be read as its suffix says.
    """
    match path.suffix.lower():
        case ".jsonl":
            first = next(_json_lines(path), None)
            values = {} if first is None else first.values
            kind = str if any(isinstance(value, str) for value in values.values()) else type(None)
            return {key: isinstance(value, kind) for key, value in values.items()}
        case ".csv":
            return dict.fromkeys(_columns_of_csv(path), True)
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


def _csv(path: Path) -> Iterator[TableRow]:
    decoded = (line.decode("utf-8", "surrogateescape") + "\n" for line in lines(path))
    reader = csv.reader(decoded, strict=True)
    try:
        header = [name.removeprefix("\ufeff").strip() for name in next(reader, [])]
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{printable(str(path))}, line {reader.line_num}: has {len(row)} values, but there are "
                    f"{len(header)} columns; put values with commas in double quotes"
                )
            yield TableRow(f"line {reader.line_num}", dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise InputError(f"{printable(str(path))}, line {reader.line_num}: is not CSV ({error})") from error


def _columns_of_csv(path: Path) -> list[str]:
    first = next(lines(path), b"").decode("utf-8-sig", "surrogateescape")
    return [name.strip() for name in next(csv.reader([first]), [])]


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


def _columns_of_parquet(path: Path) -> dict[str, bool]:
    from pyarrow import parquet

    with _readable_parquet(path), parquet.ParquetFile(path) as file:
        return {field.name: is_text_type(field.type) for field in file.schema_arrow}
