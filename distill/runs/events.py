"""Schema and reading of the events of a run (RUN/events/) and of its jobs (RUN/jobs/JOB/).

Each process appends to its own file, because lines that two hosts append to one file on NFS may be lost. Readers merge
the files by time; the lines of a file keep their order. Files are read in blocks, from either end, and are open only
while a block is read. This limits the memory and the number of open files.

A line that was cut short when its process was killed is not JSON, and is skipped. A complete line that does not match
the schema raises InputError.
"""

import heapq
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, ValidationError, with_config
from typing_extensions import TypedDict

from distill.core import records
from distill.core.errors import InputError
from distill.core.field_types import MAX_PARTS, Count, Label, Line, Name, Rate
from distill.core.records import Schema

BLOCK = 4096  # bytes of the first block; each further block is twice as large, forwards at most LARGEST
LARGEST = 2**16
SUFFIX = ".jsonl"
YEARS = 250_000_000_000  # unix seconds; Python's dates end in the year 9999

Event = dict[str, Any]
Moment = Annotated[float, Field(ge=0, lt=YEARS)]
"""unix seconds"""
Text = Annotated[str, Field(max_length=100_000)]
Logs = Annotated[dict[Label, float], Field(max_length=1000)]
Stages = Annotated[list[Name], Field(max_length=1000)]
Jobs = Annotated[list[Label], Field(max_length=1000)]
MORE = with_config(ConfigDict(extra="allow"))  # unknown fields are kept


class _TimedEvent(TypedDict):
    time: Moment


@MORE
class CreatedEvent(_TimedEvent):
    """The run was created. stages: name -> kind."""

    event: Literal["created"]
    stages: NotRequired[Annotated[dict[Name, Line], Field(max_length=1000)]]


@MORE
class StageStartedEvent(_TimedEvent):
    """A process starts or resumes a stage."""

    event: Literal["stage started"]
    stage: Name
    kind: NotRequired[Line]
    device: NotRequired[Line]


@MORE
class StageDoneEvent(_TimedEvent):
    """A stage is complete."""

    event: Literal["stage done"]
    stage: Name


@MORE
class ProgressEvent(_TimedEvent):
    """The progress of a stage.

    logs: means of its logged numbers since the last progress event. waiting: the share of the time since then in which
    training waited for data.
    """

    event: Literal["progress"]
    label: Line
    done: Count
    unit: NotRequired[Line]
    total: NotRequired[Count]
    per_second: NotRequired[Rate]
    waiting: NotRequired[Annotated[float, Field(ge=0, le=1)]]
    logs: NotRequired[Logs]


@MORE
class SavedEvent(_TimedEvent):
    """A checkpoint was saved completely."""

    event: Literal["saved"]
    stage: Name
    step: Count
    seconds: NotRequired[Rate]


@MORE
class ResumedEvent(_TimedEvent):
    """A train stage resumes from a checkpoint."""

    event: Literal["resumed"]
    stage: Name
    step: Count
    images: Count


@MORE
class WarnedEvent(_TimedEvent):
    """A warning."""

    event: Literal["warning"]
    label: Line
    text: Text


@MORE
class ProcessEvent(_TimedEvent):
    """A process that executes stages began or ended."""

    event: Literal["started", "stopped", "failed", "finished"]
    message: NotRequired[Text]


@MORE
class OtherEvent(_TimedEvent):
    """An event of an unknown kind."""

    event: Line


@MORE
class SubmittedEvent(_TimedEvent):
    """A job or a job array was submitted."""

    event: Literal["submitted"]
    stages: Stages
    parts: Annotated[list[Count], Field(max_length=MAX_PARTS)] | None
    script: Line
    after: Jobs


@MORE
class BeganEvent(_TimedEvent):
    """An attempt of a job began."""

    event: Literal["began"]
    restart: Count


@MORE
class EndedEvent(_TimedEvent):
    """An attempt of a job ended."""

    event: Literal["ended"]
    restart: Count
    why: Line
    again: bool
    message: NotRequired[Text]
    stage: NotRequired[Line]
    step: NotRequired[Count | None]


@MORE
class ExplainedEvent(_TimedEvent):
    """The reason why an attempt ended, found by the next attempt."""

    event: Literal["explained"]
    restart: Count
    why: Line


RUN: Schema[Any] = Schema(
    Annotated[
        CreatedEvent
        | StageStartedEvent
        | StageDoneEvent
        | ProgressEvent
        | SavedEvent
        | ResumedEvent
        | WarnedEvent
        | ProcessEvent,
        Field(discriminator="event"),
    ]
)
JOB: Schema[Any] = Schema(
    Annotated[SubmittedEvent | BeganEvent | EndedEvent | ExplainedEvent, Field(discriminator="event")]
)
OTHER: Schema[OtherEvent] = Schema(OtherEvent)


def parse(line: bytes, schema: Schema[Any], where: Path) -> Event | None:
    """The event of a line; None if the line is empty or cut short. InputError if it does not match the schema."""
    try:
        found: Event = schema.parse(line)
    except ValidationError as error:
        kind = error.errors(include_url=False, include_context=False)[0]["type"]
        if kind == records.NOT_JSON:
            return None
        if kind != "union_tag_invalid":
            raise InputError(_refusal(where, line, error)) from None
        try:
            found = dict(OTHER.parse(line))
        except ValidationError as other:
            raise InputError(_refusal(where, line, other)) from None
    return found


def files(folder: Path, older: Path) -> list[Path]:
    """The event files in `folder`, sorted by name, one for each process that wrote events.

    If `older` exists, it comes first: in earlier versions, all processes wrote to this file. Raises InputError if the
    folder cannot be read.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        names = []
    except OSError as error:
        problem = "it is not a folder; delete it" if isinstance(error, NotADirectoryError) else error.strerror
        raise InputError(f"{folder} cannot be read: {problem}") from None
    found = [folder / name for name in names if name.endswith(SUFFIX) and not name.startswith(".")]
    return [*([older] if os.path.lexists(older) else []), *found]


def read(paths: Sequence[Path], schema: Schema[Any], kinds: Collection[str] = ()) -> Iterator[Event]:
    """The events of these files, oldest first. A file that does not exist has none.

    kinds: only events of these kinds, without parsing lines of other kinds; empty: all events.
    """
    return heapq.merge(*(_forwards(path, schema, kinds) for path in paths), key=_time)


class Unread:
    """Reads event files of a run as they grow: each `read` returns what was added since the one before.

    A last line without a line break is still being written, or was cut short. It is left for later.
    """

    def __init__(self) -> None:
        self._places: dict[Path, int] = {}

    def read(self, paths: Sequence[Path]) -> Iterator[Event]:
        """The events that were added to these files, oldest first. All must be taken before the next `read`."""
        return heapq.merge(*(self._added(path) for path in paths), key=_time)

    def _added(self, path: Path) -> Iterator[Event]:
        begin = self._places.get(path, 0)
        self._places[path] = end = _whole(path, begin)
        yield from _forwards(path, RUN, (), begin, end)


def first(path: Path) -> Event:
    """The first event in an event file of a run; {} if there is none."""
    return next(_forwards(path, RUN, ()), {})


def backwards(paths: Sequence[Path], limit: int) -> Iterator[Event]:
    """The events in the newest `limit` bytes of a run's event files, newest first, read lazily."""
    left = limit
    # For events of the same time, the last file comes first: the reverse order of `read`.
    for event, size in heapq.merge(*(_tail(path, limit) for path in reversed(paths)), key=_time_of_sized, reverse=True):
        left -= size
        if left < 0:
            return
        yield event


def _time(event: Event) -> float:
    time: float = event["time"]
    return time


def _time_of_sized(found: tuple[Event, int]) -> float:
    return _time(found[0])


def _forwards(
    path: Path, schema: Schema[Any], kinds: Collection[str], begin: int = 0, end: int = sys.maxsize
) -> Iterator[Event]:
    """The events between two offsets of a file."""
    marks = [f'"{kind}"'.encode() for kind in kinds]
    for line in records.lines(_blocks(path, begin, end)):
        if marks and not any(mark in line for mark in marks):
            continue
        event = parse(line, schema, path)
        if event is not None and (not kinds or event["event"] in kinds):
            yield event


def _blocks(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """The content of a file between two offsets, in blocks."""
    place, size = begin, BLOCK
    while block := _block(path, place, min(size, end - place)):
        yield block
        place, size = place + len(block), min(2 * size, LARGEST)


def _block(path: Path, place: int, size: int) -> bytes:
    try:
        with records.open_regular(path) as file:
            file.seek(place)
            return file.read(size)
    except FileNotFoundError:
        return b""


def _whole(path: Path, begin: int) -> int:
    """The offset at which the last complete line of a file ends; `begin` if there is none after it."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return begin
    first = max(begin, size - records.LINE)
    found = _block(path, first, size - first).rfind(b"\n") if size > first else -1
    return first + found + 1 if found >= 0 else begin


def _tail(path: Path, limit: int) -> Iterator[tuple[Event, int]]:
    """(event, bytes of its line) for the events in the last `limit` bytes of a file, newest first."""
    begin, content = _last_block(path, min(limit, BLOCK))
    least, rest, size = max(0, begin + len(content) - limit), b"", BLOCK
    while content:
        rest, *whole = (content + rest).split(b"\n")
        for line in reversed(whole):
            if line and (event := parse(line, RUN, path)) is not None:
                yield event, len(line) + 1
        size, end = 2 * size, begin
        begin = max(least, end - size)
        content = _block(path, begin, end - begin) if begin < end else b""
    if begin == 0 and rest and (event := parse(rest, RUN, path)) is not None:
        yield event, len(rest) + 1


def _last_block(path: Path, size: int) -> tuple[int, bytes]:
    """(offset, content) of the last `size` bytes of a file."""
    try:
        with records.open_regular(path) as file:
            place = file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return place, file.read(size)
    except FileNotFoundError:
        return 0, b""


def _refusal(where: Path, line: bytes, error: ValidationError) -> str:
    shown = line[: records.SHOWN].decode(errors="replace")
    return f"{where} cannot be used: {records.mistake(error)}; repair or delete the line that begins with {shown!r}"
