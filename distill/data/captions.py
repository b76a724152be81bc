"""Reads the captions of a folder's images, which are in a file for each image or in tables."""

import errno
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.core.errors import InputError
from distill.core.regular_files import read_regular
from distill.core.text import printable
from distill.data import texttables
from distill.data.facts import CHUNK, TASK, THREADS, times
from distill.data.index import SETTLED, ImageIndex
from distill.data.prompts import MAX_LENGTH, CaptionFault, Captions, StoredCaption
from distill.data.texttables import Holds
from distill.spec.captionfiles import CaptionFiles
from distill.spec.imagefolder import ImageFolder

NAME = "file_name"  # column with the path of an image, relative to the table
COLUMNS = ("text", "caption")  # columns with the caption; a table must have one of them
SHOWN = 3  # names that a message lists


def of_folder(folder: ImageFolder, known: ImageIndex | None) -> Captions | None:
    """The captions of a folder's images; None if they are not used.

    known: an earlier index of the folder. Files that have not changed since are not read again.

    Raises InputError if a table is invalid or does not fit the images.
    """
    if folder.captions is None:
        return None
    if folder.captions.tables:
        return Captions.of(_of_tables(folder.root, folder.captions.tables, folder.names))
    files = np.zeros((len(folder.names), 3), np.int64)
    for row, state in enumerate(folder.captions.stats):
        if state is not None:
            files[row] = times(state)
    old = _unchanged(folder.names, files, known)
    return replace(Captions.of(_of_files(folder.root, folder.captions, old, known)), files=files)


# --- a file for each image ---


def of_file(path: Path) -> StoredCaption:
    """The content of a file with one caption, or why it cannot be used."""
    try:
        return read_regular(path, 4 * MAX_LENGTH, follow=True)
    except OSError as error:
        return CaptionFault.LONG if error.errno == errno.EFBIG else CaptionFault.UNREAD


def _unchanged(names: Sequence[str], files: NDArray[np.int64], known: ImageIndex | None) -> NDArray[np.int64]:
    """For each image, the row of the earlier index that has its caption as it is now; -1: it must be read. [N]"""
    found = np.full(len(names), -1, np.int64)
    if known is None or known.caption_files is None:
        return found
    where = {known.name(row): row for row in range(len(known))}
    rows = np.array([where.get(name, -1) for name in names], np.int64)
    are_same = (rows >= 0) & (known.caption_files[rows] == files).all(1)
    are_settled = (files[:, 0] > 0) & (files[:, 1] < known.head.written - SETTLED)
    return np.where(are_same & are_settled, rows, found)


def _of_files(
    root: Path, found: CaptionFiles, old: NDArray[np.int64], known: ImageIndex | None
) -> Iterator[StoredCaption]:
    """Yields the caption of each image. Files are read by several threads."""

    def caption(row: int) -> StoredCaption:
        name, before = found.sidecars[row], int(old[row])
        if name is None:
            return None
        if known is not None and known.captions is not None and before >= 0:
            label = int(known.labels[before])
            return known.captions.prompts[label] if label >= 0 else CaptionFault(-label)
        return of_file(root / name)

    def task(start: int) -> list[StoredCaption]:
        return [caption(row) for row in range(start, min(start + TASK, len(old)))]

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(old), CHUNK):
            yield from chain.from_iterable(pool.map(task, range(start, min(start + CHUNK, len(old)), TASK)))


# --- tables ---


def _of_tables(root: Path, tables: Iterable[str], names: Sequence[str]) -> list[StoredCaption]:
    """The caption of each image. Raises InputError for rows of other files, or two rows of the same file."""
    where = {name: row for row, name in enumerate(names)}
    found: list[StoredCaption] = [None] * len(names)
    place: dict[int, str] = {}
    for table in tables:
        path, folder = root / table, table.rpartition("/")[0]
        column = _column(path)
        other = next(name for name in COLUMNS if name != column)
        missing: list[str] = []
        for row in texttables.rows(path, [NAME, *COLUMNS]):
            at = f"{printable(str(path))}, {row.place}"
            name = _name(row.values, at)
            if row.values.get(column) is not None and row.values.get(other) is not None:
                raise InputError(
                    f"{printable(str(path))}: has the columns 'text' and 'caption'; remove the one not to use"
                )
            if row.values.get(other) is not None:
                raise InputError(f"{at}: has '{other}', but earlier rows have '{column}'; use one of both for all rows")
            image = where.get(posixpath.normpath(posixpath.join(folder, name)))
            if image is None:
                missing.append(f"{printable(name)} in {row.place}")
                continue
            here = f"{row.place} of {printable(table)}"
            if place.setdefault(image, here) != here:
                raise InputError(
                    f"{at}: gives {printable(name)} a second caption, after {place[image]}; remove one of both"
                )
            try:
                found[image] = texttables.stored(row.values.get(column))
            except TypeError as error:
                raise InputError(f"{at}: '{column}' is of type {error}, but a caption must be a text") from error
        if missing:
            shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
            raise InputError(
                f"{printable(str(path))}: {len(missing)} rows name files that are not among the images ({shown}); "
                "correct the paths, which are relative to the table, or add the images"
            )
    return found


def _column(path: Path) -> str:
    """The column of the captions. Raises InputError if the columns do not fit."""
    columns = texttables.columns_of(path)
    given = sorted(set(COLUMNS) & columns.keys(), key=list(columns).index)
    shown = printable(", ".join(columns) or "none")
    if NAME not in columns:
        raise InputError(f"{printable(str(path))}: has no column '{NAME}' with the paths of the images, only: {shown}")
    if not given:
        raise InputError(
            f"{printable(str(path))}: has no column 'text' or 'caption' with the captions, only: {shown}; rename one"
        )
    return next((name for name in given if columns[name] is not Holds.NOTHING), given[0])


def _name(values: dict[str, object], at: str) -> str:
    """The path of the image of a row."""
    name = values.get(NAME)
    if isinstance(name, bytes):
        name = name.decode("utf-8", "surrogateescape")
    if not isinstance(name, str) or not name:
        raise InputError(f"{at}: has no '{NAME}'; give the path of the image")
    return name
