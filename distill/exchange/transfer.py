"""Downloads one file: hashes it while it arrives, resumes after a failure, and gives it its name once complete."""

import hashlib
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from distill.core.errors import InputError, RunError
from distill.exchange.student_card import FileRecord
from distill.exchange.transports import Broken, Missing, Refused, RemoteSource, Stream

BLOCK = 4 << 20  # bytes of a block; at most two blocks of each file are in memory
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)  # seconds before the next attempt, by the number of failures in a row
LEAST = 64 << 10  # bytes; an attempt that received fewer counts as a failure
WINDOW = 60.0  # seconds in which at least LEAST bytes must arrive
CORRUPT = 2  # how often a file is fetched again if it arrives damaged


@dataclass
class Tally:
    """The number of bytes received for all files, and a flag to stop. Shared between threads."""

    bytes: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        with self.lock:
            self.bytes += count


class FilePart:
    """A partial file and the digest of its content. A thread hashes each block while it is written to disk."""

    def __init__(self, path: Path, size: int) -> None:
        self.size = 0
        self._digest, self._hashing = hashlib.sha256(), Future[None]()
        self._hashing.set_result(None)
        self._hasher = ThreadPoolExecutor(1)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+", buffering=0)
        if self._file.tell() > size:
            self.restart()
        self._file.seek(0)
        while block := self._file.read(BLOCK):  # received by an earlier process
            self._digest.update(block)
            self.size += len(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hasher.shutdown()
        self._file.close()

    def add(self, block: bytes) -> None:
        self._hashing.result()
        self._hashing = self._hasher.submit(self._digest.update, block)
        view = memoryview(block)
        while view:
            view = view[self._file.write(view) :]
        self.size += len(block)

    def restart(self) -> None:
        self._hashing.result()
        self._file.truncate(0)
        self._digest, self.size = hashlib.sha256(), 0

    def finish(self) -> str:
        """Sync the file to disk, and return its sha256."""
        os.fsync(self._file.fileno())
        self._hashing.result()
        return self._digest.hexdigest()


def fetch(source: RemoteSource, name: str, record: FileRecord, path: Path, tally: Tally) -> None:
    """Fetch the file `name` to `path`, and verify its size and sha256. Resumes a partial file of an earlier process.

    Raises RunError if the transfer or writing fails, and InputError if the source does not have or give the file. If
    `tally.stop` is set, it returns early without a complete file.
    """
    part_path = path.with_name(f"{path.name}.part")
    try:
        if path.exists():  # complete, unless the machine crashed before the file was synced to disk
            path.replace(part_path)
        with FilePart(part_path, record.size) as part:
            tally.add(part.size)
            _complete(source, name, record, part, tally)
        if not tally.stop.is_set():
            part_path.rename(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; the part received so far is kept") from error


def _complete(source: RemoteSource, name: str, record: FileRecord, part: FilePart, tally: Tally) -> None:
    failures = damaged = 0
    while not tally.stop.is_set():
        before, why = part.size, ""
        try:
            if part.size < record.size or not record.size:
                with source.open(name, part.size) as stream:
                    why = _receive(stream, part, record.size, tally)
        except Broken as broken:
            why = "" if part.size == record.size else str(broken)
        except Missing as missing:
            raise InputError(f"{missing}, but distill.json lists it; the published student is incomplete") from missing
        except Refused as refused:
            raise InputError(str(refused)) from refused
        if part.size == record.size:
            if not why:
                found = part.finish()
                if found == record.sha256:
                    return
                why = f"damaged: sha256 {found[:12]}, expected {record.sha256[:12]}"
            tally.add(-part.size)
            part.restart()
            damaged += 1
            if damaged > min(CORRUPT, source.retries):
                raise RunError(f"{source.where}: {name}: {why}; the received data was discarded")
        failures = 0 if part.size - before >= LEAST else failures + 1
        if failures > source.retries:
            hint = (
                "the part received so far is kept; run the same command again to continue"
                if source.retries
                else "the published copy is incomplete"
            )
            raise RunError(f"{source.where}: {name}: {why}; {hint}")
        tally.stop.wait(PAUSES[min(failures, len(PAUSES)) - 1] if failures else 0)


def _receive(stream: Stream, part: FilePart, size: int, tally: Tally) -> str:
    """Receive the rest of a file; returns why it is incomplete, or "" if it is complete."""
    begin, before = time.monotonic(), part.size
    while block := stream.read(min(BLOCK, size - part.size + 1)):  # one byte more than expected, to detect extra data
        if time.monotonic() - begin > WINDOW:
            if (came := part.size + len(block) - before) < LEAST and part.size + len(block) < size:
                return f"too slow: {came:,} bytes in {WINDOW:.0f} s"
            begin, before = time.monotonic(), part.size
        own = block[: size - part.size]
        part.add(own)
        tally.add(len(own))
        if len(own) < len(block):
            return f"longer than the {size:,} bytes that distill.json lists"
        if tally.stop.is_set():
            break
    return "" if part.size == size else f"the transfer ended after {part.size:,} of {size:,} bytes"
