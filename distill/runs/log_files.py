"""Logs of a run's processes, read in pieces: however long a log is, the memory is the same."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from distill.core import records
from distill.core.printing import say
from distill.core.text import printable

BLOCK = 2**16  # bytes read at once
TAIL = 2**20  # bytes at the end of a log in which a failure is looked for: it is the last that a process says
STAMP = re.compile(rb"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  ")
LINE_STAMP = re.compile(STAMP.pattern.replace(rb"(", rb"^(", 1), re.MULTILINE)
SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
FAILED = re.compile(rb"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  rank (\d{1,9}) failed:")


@dataclass(frozen=True)
class Failure:
    """A traceback in a log."""

    time: str
    rank: int
    path: Path
    text: str


def last_lines(file: BinaryIO, count: int) -> int:
    """The place in an open log where its last `count` lines begin."""
    end = place = file.seek(0, 2)
    left = count + 1  # line breaks; that of the last line ends it
    while place > 0:
        begin = max(0, place - BLOCK)
        file.seek(begin)
        block = file.read(place - begin)
        if place == end and not block.endswith(b"\n"):
            left -= 1
        found = block.count(b"\n")
        if found >= left:
            at = len(block)
            for _ in range(left):
                at = block.rindex(b"\n", 0, at)
            return begin + at + 1
        left, place = left - found, begin
    return 0


def first_since(file: BinaryIO, moment: str) -> int:
    """The place in an open log of the first line that is stamped with this moment or a later one; else its end."""
    file.seek(0)
    text, place, rest = moment.encode(), 0, b""
    while block := file.read(BLOCK):
        content = rest + block
        end = content.rfind(b"\n") + 1 if len(content) <= records.LINE else len(content)
        for match in LINE_STAMP.finditer(content, 0, end):
            if match[1] >= text:
                return place + match.start()
        place, rest = place + end, content[end:]
    last = STAMP.match(rest)
    return place if last is not None and last[1] >= text else place + len(rest)


def write(path: Path, at: int, *, unfinished: bool = True) -> int:
    """Print a log from a place on: the place it has come to. unfinished: also a last line without its end.

    What a terminal would obey is replaced. A log that is shorter than `at` was begun anew, and is printed whole.
    """
    with records.open_regular(path) as file:
        at = file.seek(at if at <= file.seek(0, 2) else 0)
        rest = b""
        while block := file.read(BLOCK):
            *whole, rest = (rest + block).split(b"\n")
            if len(rest) > records.LINE:
                whole, rest = [*whole, rest], b""
            if whole:
                _say(b"\n".join(whole) + b"\n")
            at += len(block)
        if unfinished and rest:
            _say(rest)
            rest = b""
    say(end="", flush=True)
    return at - len(rest)


def failures(path: Path) -> Iterator[Failure]:
    """The tracebacks at the end of a log."""
    with records.open_regular(path) as file:
        file.seek(max(0, file.seek(0, 2) - TAIL))
        text = file.read(TAIL)
    for match in FAILED.finditer(text):
        end = STAMP.search(text, match.end())
        said = text[match.end() : end.start() if end else None].lstrip(b"\n")
        yield Failure(match[1].decode(), int(match[2]), path, printable(said.decode(errors="replace")))


def _say(content: bytes) -> None:
    text = SEQUENCE.sub("", content.decode(errors="replace"))
    say(text.replace("\r\n", "\n").replace("\r", "\n"), end="")  # a bar of progress that was written over, as lines
