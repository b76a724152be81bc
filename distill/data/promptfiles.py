"""Data of kind prompts: texts without images, read from text files, JSON Lines or parquet, once for all runs.

The prompts are kept in STORE/indexes and RUN/indexes, like the indexes of images (see `index`): a run has its own copy,
files that have not changed are not read again, and an invalid copy is replaced.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from distill.core.errors import InputError
from distill.core.text import printable, suggest
from distill.data import arrayfile, prompts, skipping, texttables
from distill.data.facts import times
from distill.data.index import SETTLED
from distill.data.prompts import FAULTS, CaptionFault, Prompts
from distill.spec.dataspec import PromptsData

SHOWN = 5  # names that a message lists
SUFFIXES = (".txt", ".jsonl", ".parquet")

_READ: dict[Path, "FoundPrompts"] = {}  # by their path relative to a store or a run

FileState = tuple[str, int, int, int]  # path below the given one, size, mtime and ctime


class _PromptsHead(BaseModel):
    """The metadata of kept prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    files: list[FileState]
    written: int
    """when reading started, in nanoseconds since 1970"""
    total: int = Field(ge=1)
    """number of lines or rows"""
    skipped: list[str]
    """the first of those without a usable prompt, and why"""


@dataclass(frozen=True)
class FoundPrompts:
    """The prompts of a data set, and what was skipped."""

    head: _PromptsHead
    prompts: Prompts

    def refuse(self, spec: PromptsData) -> None:
        """Warns about lines and rows without a usable prompt. Raises InputError if there are too many."""
        if count := self.head.total - len(self.prompts):
            skipping.report(
                f"{printable(spec.path)}: {count:,} of {self.head.total:,} prompts cannot be used",
                [printable(each) for each in self.head.skipped],
                found=count,
                total=self.head.total,
                limit=spec.max_unreadable,
                todo="correct or remove them",
            )


def load(spec: PromptsData, folder: Path | None = None, *, indexed: bool = False) -> FoundPrompts:
    """The prompts of a data set. folder, indexed: see `data.load_data`.

    Raises InputError if the files cannot be read, or if more lines than spec.max_unreadable have no usable prompt.
    """
    known = None if folder is None else read(path(folder, spec))
    found = known if known is not None and indexed else update(spec, known)
    found.refuse(spec)
    return found


def update(spec: PromptsData, known: FoundPrompts | None) -> FoundPrompts:
    """The prompts as they are now: `known`, or what this process read before, if no file has changed since."""
    place, now, files = path(Path(), spec), time.time_ns(), _files(spec)
    states = [_state(spec, file) for file in files]
    known = _READ.get(place, known)
    settled = known is not None and all(mtime < known.head.written - SETTLED for _, _, mtime, _ in states)
    if known is None or not settled or known.head.files != states:
        known = _read(spec, files, states, now)
    _READ[place] = known
    return known


def path(folder: Path, spec: PromptsData) -> Path:
    """The path of the kept prompts of a data set in a store or a run."""
    parts = [spec.kind, str(Path(spec.path).absolute()), spec.column]
    return folder / "indexes" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.safetensors"


def read(path: Path) -> FoundPrompts | None:
    """Reads kept prompts. Returns None if there are none, or if the file is damaged or of another version."""
    kept = arrayfile.read(path, _PromptsHead)
    if kept is None or {name: (str(each.dtype), each.ndim) for name, each in kept[1].items()} != _ARRAYS:
        return None
    head, arrays = kept
    found = Prompts(arrays["content"].view(np.uint8), arrays["ends"].view(np.int64))
    fits = 0 < len(found) <= head.total and prompts.are_valid(found.content, found.ends)
    return FoundPrompts(head, found) if fits else None


_ARRAYS = {"content": ("uint8", 1), "ends": ("int64", 1)}


def write(path: Path, found: FoundPrompts) -> None:
    """Writes prompts atomically. Raises RunError if they cannot be written."""
    arrayfile.write(path, found.head, {"content": found.prompts.content, "ends": found.prompts.ends})


# --- reading ---


def _read(spec: PromptsData, files: list[Path], states: list[FileState], now: int) -> FoundPrompts:
    skipped: list[str] = []
    total = 0

    def usable() -> Iterator[str]:
        nonlocal total
        for place, each in _stored(spec, files):
            text = prompts.cleaned(each)
            total += 1
            if not isinstance(text, CaptionFault):
                yield text
            elif len(skipped) < SHOWN:
                skipped.append(f"{place}: {FAULTS[text].replace('caption', 'prompt')}")

    found = Prompts.of(usable())
    if not total:
        raise InputError(f"data.path={printable(spec.path)} has no prompts; give a file with one prompt on each line")
    return FoundPrompts(_PromptsHead(files=states, written=now, total=total, skipped=skipped), found)


def _stored(spec: PromptsData, files: list[Path]) -> Iterator[tuple[str, bytes | str | None]]:
    """Yields the place and the stored text of each prompt."""
    if files[0].suffix.lower() == ".txt":
        for number, line in enumerate(texttables.lines(files[0]), start=1):
            yield f"line {number}", line
        return
    column = _column(spec, files[0])
    for file in files:
        if file != files[0] and not texttables.columns_of(file).get(column):
            raise InputError(
                f"{printable(str(file))}: has no column '{printable(column)}' with texts, unlike "
                f"{printable(files[0].name)}; give files with the same columns"
            )
        inside = "" if len(files) == 1 else f" of {file.name}"
        for row in texttables.rows(file, [column]):
            try:
                text = texttables.stored(row.values.get(column))
            except TypeError as error:
                raise InputError(
                    f"{printable(str(file))}, {row.place}: '{printable(column)}' is of type {error}, but a prompt must "
                    "be a text"
                ) from error
            yield f"{row.place}{inside}", text


def _column(spec: PromptsData, file: Path) -> str:
    """The column of the prompts. Raises InputError if it does not exist or has no texts, or if it is not clear."""
    columns = texttables.columns_of(file)
    texts = [name for name, is_text in columns.items() if is_text]
    where = printable(str(file))
    if spec.column is None:
        if len(texts) == 1:
            return texts[0]
        if not texts:
            raise InputError(f"{where}: has no column with texts, only: {printable(', '.join(columns) or 'none')}")
        raise InputError(
            f"{where}: has {len(texts)} columns with texts; choose one with data.column: {printable(', '.join(texts))}"
        )
    if spec.column not in columns:
        raise InputError(
            f"data.column={printable(spec.column)}: {where} has no such column; "
            f"{printable(suggest(spec.column, texts or columns))}"
        )
    if not columns[spec.column]:
        raise InputError(
            f"data.column={printable(spec.column)}: has no texts in {where}; columns with texts: "
            f"{printable(', '.join(texts) or 'none')}"
        )
    return spec.column


def _files(spec: PromptsData) -> list[Path]:
    """The files with the prompts, sorted. Raises InputError if there are none, or settings have no effect."""
    place = Path(spec.path)
    shown = printable(spec.path)
    valid = "give a .txt file with one prompt on each line, a .jsonl or .parquet file, or a folder of parquet files"
    if place.is_dir():
        found = sorted(place.rglob("*.parquet"))
        files = [file for file in found if not any(part[0] == "." for part in file.relative_to(place).parts)]
        if not files:
            raise InputError(f"data.path={shown} contains no parquet files; {valid}")
        return files
    if not place.exists():
        raise InputError(f"data.path={shown} does not exist; {valid}")
    if place.suffix.lower() not in SUFFIXES:
        raise InputError(f"data.path={shown}: files of prompts end in {', '.join(SUFFIXES)}; {valid}")
    if place.suffix.lower() == ".txt" and spec.column is not None:
        raise InputError(f"data.column={printable(spec.column)} has no effect: a .txt file has no columns; remove it")
    return [place]


def _state(spec: PromptsData, file: Path) -> FileState:
    try:
        return (str(file.relative_to(spec.path)), *times(file.stat()))
    except OSError as error:
        raise InputError(f"{printable(str(file))} cannot be read: {error.strerror}; repair or remove it") from error
