"""Data of kind prompts: texts without images, read from text files, JSON Lines or parquet, once for all runs.

The prompts are kept in STORE/indexes and RUN/indexes, like the indexes of images (see `index`): a run has its own copy,
files that have not changed are not read again, and an invalid copy is replaced.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from distill.core.errors import InputError
from distill.core.text import printable, suggest
from distill.data import KindLoader, arrayfile, promptindex, prompts, texttables
from distill.data.facts import times
from distill.data.index import SETTLED
from distill.data.promptindex import FileState, FoundPrompts, PromptsHead
from distill.data.prompts import FAULTS, CaptionFault, Prompts
from distill.data.texttables import Holds
from distill.spec.dataspec import PromptsData

SHOWN = 5  # names that a message lists
SUFFIXES = (".txt", ".jsonl", ".parquet")

_READ: dict[Path, FoundPrompts] = {}  # by their path relative to a store or a run


class _PromptFiles:
    """Loads data of kind prompts. Implements `data.KindLoader` and `data.PromptLoader`."""

    def load(self, spec: PromptsData, seed: int, folder: Path | None, *, keep: bool, indexed: bool) -> None:
        """Does nothing: there are no samples."""

    def load_prompts(self, spec: PromptsData, folder: Path | None, *, indexed: bool) -> FoundPrompts:
        """See `data.load_prompts`.

        Raises InputError if the files cannot be read, or if more lines than spec.max_unreadable have no usable prompt.
        """
        known = None if folder is None else promptindex.read(folder / spec.index_file)
        found = known if known is not None and indexed else _updated(spec, known)
        found.refuse(spec)
        return found

    def update_index(self, spec: PromptsData, store: Path, run: Path | None) -> None:
        """See `data.update_index`."""

        def make(known: FoundPrompts | None) -> FoundPrompts:
            return _updated(spec, known)

        arrayfile.update(spec.index_file, store, run, read=promptindex.read, make=make, write=promptindex.write)


def _updated(spec: PromptsData, known: FoundPrompts | None) -> FoundPrompts:
    """The prompts as they are now: `known`, or what this process read before, if no file has changed since."""
    place, now, files = spec.index_file, time.time_ns(), _files(spec)
    states = [_state(spec, file) for file in files]
    known = _READ.get(place, known)
    settled = known is not None and all(mtime < known.head.written - SETTLED for _, _, mtime, _ in states)
    if known is None or not settled or known.head.files != states:
        known = _read(spec, files, states, now)
    _READ[place] = known
    return known


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
    return FoundPrompts(PromptsHead(files=states, written=now, total=total, skipped=skipped), found)


def _stored(spec: PromptsData, files: list[Path]) -> Iterator[tuple[str, bytes | str | None]]:
    """Yields the place and the stored text of each prompt."""
    if files[0].suffix.lower() == ".txt":
        for number, line in enumerate(texttables.lines(files[0]), start=1):
            yield f"line {number}", line
        return
    column = _column(spec, files[0])
    for file in files:
        if file != files[0] and texttables.columns_of(file).get(column) is not Holds.TEXTS:
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
    texts = [name for name, holds in columns.items() if holds is Holds.TEXTS]
    texts = texts or [name for name, holds in columns.items() if holds is Holds.NOTHING]
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
    if columns[spec.column] is Holds.OTHERS:
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


LOADER: KindLoader[PromptsData] = _PromptFiles()
