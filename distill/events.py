"""What a run notes in events.jsonl, and its jobs in jobs/JOB.jsonl, by schema; read in a stream, from either end.

A line that a kill has cut short is no JSON, and passed over. A whole line that does not fit is an InputError.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NotRequired

from pydantic import ConfigDict, Field, ValidationError, with_config
from typing_extensions import TypedDict

from distill import records
from distill.fieldtypes import MAX_PARTS, Count, Label, Line, Name, Rate
from distill.guard import InputError
from distill.records import Schema

BLOCK = 4096  # bytes of the first look at the end of a file
YEARS = 250_000_000_000  # unix seconds; dates end at year 9999

Event = dict[str, Any]
Moment = Annotated[float, Field(ge=0, lt=YEARS)]
"""unix seconds"""
Text = Annotated[str, Field(max_length=100_000)]
Logs = Annotated[dict[Label, float], Field(max_length=1000)]
Stages = Annotated[list[Name], Field(max_length=1000)]
Jobs = Annotated[list[Label], Field(max_length=1000)]
MORE = with_config(ConfigDict(extra="allow"))  # fields that nothing reads stay as they are


class _Noted(TypedDict):
    time: Moment


@MORE
class Created(_Noted):
    """The run was made: the kind of each of its stages."""

    event: Literal["created"]
    stages: NotRequired[Annotated[dict[Name, Line], Field(max_length=1000)]]


@MORE
class StageStarted(_Noted):
    """A process begins with a stage, or goes on with it."""

    event: Literal["stage started"]
    stage: Name
    kind: NotRequired[Line]
    device: NotRequired[Line]


@MORE
class StageDone(_Noted):
    """A stage is complete."""

    event: Literal["stage done"]
    stage: Name


@MORE
class Progress(_Noted):
    """How far a stage is; means of its numbers since the last such line."""

    event: Literal["progress"]
    label: Line
    done: Count
    unit: NotRequired[Line]
    total: NotRequired[Count]
    per_second: NotRequired[Rate]
    logs: NotRequired[Logs]


@MORE
class Saved(_Noted):
    """A checkpoint is complete."""

    event: Literal["saved"]
    stage: Name
    step: Count
    seconds: NotRequired[Rate]


@MORE
class Resumed(_Noted):
    """A train stage goes on from a checkpoint."""

    event: Literal["resumed"]
    stage: Name
    step: Count
    images: Count


@MORE
class Warned(_Noted):
    """Something that must not be missed."""

    event: Literal["warning"]
    label: Line
    text: Text


@MORE
class Process(_Noted):
    """A process that executes stages began, or ended."""

    event: Literal["started", "stopped", "failed", "finished"]
    message: NotRequired[Text]


@MORE
class Other(_Noted):
    """What nothing here reads."""

    event: Line


@MORE
class Submitted(_Noted):
    """A job, or an array of them, went into the queue."""

    event: Literal["submitted"]
    stages: Stages
    parts: Annotated[list[Count], Field(max_length=MAX_PARTS)] | None
    script: Line
    after: Jobs


@MORE
class Began(_Noted):
    """An attempt of a job began."""

    event: Literal["began"]
    restart: Count


@MORE
class Ended(_Noted):
    """An attempt of a job ended."""

    event: Literal["ended"]
    restart: Count
    why: Line
    again: bool
    message: NotRequired[Text]
    stage: NotRequired[Line]
    step: NotRequired[Count | None]


@MORE
class Explained(_Noted):
    """Why an attempt ended, as the next one found."""

    event: Literal["explained"]
    restart: Count
    why: Line


RUN: Schema[Any] = Schema(
    Annotated[
        Created | StageStarted | StageDone | Progress | Saved | Resumed | Warned | Process,
        Field(discriminator="event"),
    ]
)
JOB: Schema[Any] = Schema(Annotated[Submitted | Began | Ended | Explained, Field(discriminator="event")])
OTHER: Schema[Other] = Schema(Other)


def parse(line: bytes, schema: Schema[Any], where: Path) -> Event | None:
    """A line's event; None: a kill has cut it short, or it is empty. InputError if it does not fit the schema."""
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


def read(path: Path, schema: Schema[Any], kinds: Collection[str] = ()) -> Iterator[Event]:
    """The events of a file, oldest first, with a bounded part of it in memory; of some kinds only, if any is named.

    Nothing where there is no file. Lines of other kinds are then not even parsed.
    """
    marks = [f'"{kind}"'.encode() for kind in kinds]
    try:
        file = records.open_regular(path)
    except FileNotFoundError:
        return
    with file:
        for line in records.lines(file):
            if marks and not any(mark in line for mark in marks):
                continue
            event = parse(line, schema, path)
            if event is not None and (not kinds or event["event"] in kinds):
                yield event


def first(file: BinaryIO, path: Path) -> Event:
    """The first event of an open file of a run; {}: there is none."""
    file.seek(0)
    line = file.read(BLOCK)
    while b"\n" not in line and len(line) < records.LINE and (more := file.read(records.LINE)):
        line += more
    return parse(line.partition(b"\n")[0], RUN, path) or {}


def backwards(file: BinaryIO, path: Path, limit: int) -> Iterator[Event]:
    """The events of an open file of a run within its last `limit` bytes, newest first; reads as far as is asked for."""
    end = os.fstat(file.fileno()).st_size
    least = max(0, end - limit)
    rest, block = b"", BLOCK
    while end > least:
        begin = max(least, end - block)
        file.seek(begin)
        head, *whole = (file.read(end - begin) + rest).split(b"\n")
        for line in reversed(whole):
            if line and (event := parse(line, RUN, path)) is not None:
                yield event
        rest, end, block = head, begin, 2 * block
    if least == 0 and rest and (event := parse(rest, RUN, path)) is not None:
        yield event


def _refusal(where: Path, line: bytes, error: ValidationError) -> str:
    shown = line[: records.SHOWN].decode(errors="replace")
    return f"{where} cannot be used: {records.mistake(error)}; repair or delete the line that begins with {shown!r}"
