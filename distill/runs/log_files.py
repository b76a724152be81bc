"""Reads logs of a run's processes in blocks, so that memory use does not depend on their length."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from distill.core import records
from distill.core.printing import say
from distill.core.text import printable

BLOCK = 2**16  # bytes read at once
TAIL = 2**20  # bytes at the end of a log in which failures are searched; a failure is the last output of a process
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
    """The offset in an open log at which its last `count` lines begin."""
    end = place = file.seek(0, 2)
    left = count + 1  # line breaks to find, including the one that ends the last line
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
    """The offset in an open log of the first line whose time stamp is `moment` or later; its end if there is none."""
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
    """Print a log from the offset `at`, and return the offset up to which it was printed.

    Characters that control a terminal are replaced. A log that is shorter than `at` has been rewritten, so all of it is
    printed. unfinished: also print a last line that has no line break yet.
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
    """The failures with their tracebacks in the last `TAIL` bytes of a log."""
    with records.open_regular(path) as file:
        file.seek(max(0, file.seek(0, 2) - TAIL))
        text = file.read(TAIL)
    for match in FAILED.finditer(text):
        end = STAMP.search(text, match.end())
        said = text[match.end() : end.start() if end else None].lstrip(b"\n")
        yield Failure(match[1].decode(), int(match[2]), path, printable(said.decode(errors="replace")))


def _say(content: bytes) -> None:
    text = SEQUENCE.sub("", content.decode(errors="replace"))
    say(text.replace("\r\n", "\n").replace("\r", "\n"), end="")  # each update of a progress bar becomes a line
