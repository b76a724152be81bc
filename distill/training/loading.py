"""Worker processes that prepare the next batches while the networks are trained on the current one.

A source of batches is stateless, so a worker can prepare any batch, and the batches are the same with any number of
workers. `torch.utils.data.DataLoader` starts the workers, keeps the order and pins memory.

Workers are forked where that is possible, so that they share the memory of the source instead of copying it. Signals
that ask a run to stop also reach its workers, because terminals and Slurm send them to all processes. Workers ignore
them: the main process finishes its step, saves, and ends its workers. They also end if it is killed.
"""

import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from distill.core import printing
from distill.core.errors import InputError, RunError
from distill.core.stop import SIGNALS
from distill.data import DataSet
from distill.data.source import Skipping
from distill.flow.draws import Rows
from distill.protocols import Batch, Source

AHEAD = 2  # micro-batches that each worker prepares in advance
WATCH = 1.0  # seconds between two looks whether the main process still exists
ENDED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(?: is killed by signal: ([^.]+))?")
StepRows = tuple[int, Rows]  # step, rows


@contextmanager
def opened(
    source: Source, workers: int, share: Rows, *, data: DataSet | None = None, pinned: bool = False
) -> Iterator[Source]:
    """A context with a source of the same batches, which `workers` processes prepare in advance; 0: `source` itself.

    The workers end with the context. RunError if one ends by itself, for example because it was killed.

    share: the rows of the global batch that this process trains on, in equal parts.
    data: the data set of `source`; what its copies in the workers find unreadable is reported by this one.
    pinned: put batches into pinned memory, from which they are copied to a GPU without waiting.
    """
    if workers == 0:
        yield source
        return
    loader = Loader(source, workers, share, data, pinned=pinned)
    try:
        yield loader
    except RuntimeError as error:
        found = ENDED.search(str(error))
        if found is None:
            raise
        raise RunError(_told(found[1], found[2] or loader.signal_of_worker())) from error
    finally:
        loader.close()


def _told(pids: str, killed: str | None) -> str:
    advice = "what was saved is intact; resume the run"
    if killed is not None and killed.startswith("Bus error"):
        how = "ran out of shared memory"
        advice += ", with a larger /dev/shm (containers: --shm-size, or --ipc=host), or with fewer launch.workers"
    elif killed is None:
        how = "ended unexpectedly"
    else:
        how = f"was ended by a signal: {killed.strip()} (out of memory?)"
        advice += "; fewer launch.workers need less memory"
    return f"a worker process (pid {pids}) that reads data {how}; {advice}"


@dataclass(frozen=True)
class Delivery:
    """A batch from a worker, or the error that it raised, and what it found out about the data."""

    batch: Batch | None
    error: InputError | RunError | None
    skipped: list[int]
    """rows that were found to be unreadable, see `Skipping`"""
    warned: list[str]

    def pin_memory(self) -> "Delivery":
        """Called by DataLoader."""
        return replace(self, batch=None if self.batch is None else self.batch.pin_memory())


class Loader:
    """Batches that worker processes prepare in advance. Implements `protocols.Source`; see `opened`.

    It expects to be asked for one micro-batch after another, all of the same size. Any other request is valid too: the
    workers then start again from there, or, if the rows are not a part of `share` as expected, are not used.
    """

    def __init__(self, source: Source, workers: int, share: Rows, data: DataSet | None, *, pinned: bool) -> None:
        self.source, self.workers, self.share, self.data, self.pinned = source, workers, share, data, pinned
        self._expected: Iterator[StepRows] = iter(())
        self._next: StepRows | None = None
        self._deliveries: Any = None  # the iterator of a DataLoader
        self._thread: ThreadPoolExecutor | None = None  # it takes the next delivery while the network is trained
        self._arriving: Future[Delivery] | None = None

    def batch(self, step: int, rows: Rows) -> Batch:
        """These rows of the batch of `step`, on the CPU. Raises the errors of the source."""
        if not _is_part(rows, self.share):
            return self.source.batch(step, rows)
        if self._next != (step, rows):
            self._start(step, rows)
        self._next = None  # in case of an error
        assert self._thread is not None and self._arriving is not None
        found = self._arriving.result()
        self._arriving = self._thread.submit(next, self._deliveries)
        for text in found.warned:
            printing.warn(text)
        if found.skipped and isinstance(self.data, Skipping):
            self.data.skip(found.skipped)
        if found.error is not None:
            raise found.error
        assert found.batch is not None
        self._next = next(self._expected)
        return found.batch

    def signal_of_worker(self) -> str | None:
        """The description of the signal that has ended a worker, such as "Killed"; None: there is no such worker."""
        codes = [] if self._deliveries is None else [worker.exitcode for worker in self._deliveries._workers]
        return next((signal.strsignal(-code) for code in codes if code is not None and code < 0), None)

    def close(self) -> None:
        """End the workers."""
        if self._thread is not None:
            self._thread.shutdown()  # waits for the delivery that is arriving
            self._thread = self._arriving = None
        if self._deliveries is not None:
            self._deliveries._shutdown_workers()  # otherwise they end when nothing refers to the iterator any more
            self._deliveries = None

    def _start(self, step: int, rows: Rows) -> None:
        self.close()
        self._expected = _keys(step, rows, self.share)
        next(self._expected)
        loader = DataLoader(
            _Batches(self.source, self.data),
            batch_size=None,
            sampler=_keys(step, rows, self.share),
            num_workers=self.workers,
            collate_fn=_unchanged,
            pin_memory=self.pinned,
            worker_init_fn=partial(_begin, os.getpid()),
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            generator=torch.Generator(),  # the global one must not depend on the number of workers
            prefetch_factor=AHEAD,
        )
        # Threads and processes that are started here inherit the mask, so that no signal interrupts them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with warnings.catch_warnings():
                # Workers use nothing that other threads of this process may have locked.
                warnings.filterwarnings("ignore", r".*use of fork\(\) may lead to deadlocks", DeprecationWarning)
                self._deliveries = iter(loader)
            self._thread = ThreadPoolExecutor(1, "loader")
            self._arriving = self._thread.submit(next, self._deliveries)
        except OSError as error:
            raise RunError(
                f"cannot start {self.workers} worker processes: {error.strerror}; what was saved is intact; resume "
                "the run, with fewer launch.workers"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_part(rows: Rows, share: Rows) -> bool:
    """Whether `rows` is one of the equal parts of `share`."""
    size, whole = rows.stop - rows.start, share.stop - share.start
    inside = rows.total == share.total and share.start <= rows.start and rows.stop <= share.stop
    return inside and whole % size == 0 and (rows.start - share.start) % size == 0


def _keys(step: int, rows: Rows, share: Rows) -> Iterator[StepRows]:
    """The micro-batches of `share`, step by step, from `rows` of `step` on, without end."""
    size, start = rows.stop - rows.start, rows.start
    while True:
        yield step, Rows(start, start + size, share.total)
        start += size
        if start == share.stop:
            step, start = step + 1, share.start


@dataclass(frozen=True)
class _Batches:
    """The data set of a DataLoader: a source, by (step, rows)."""

    source: Source
    data: DataSet | None

    def __getitem__(self, key: StepRows) -> Delivery:
        known = len(self.data.skipped) if isinstance(self.data, Skipping) else 0
        batch, failed = None, None
        with warnings.catch_warnings(record=True) as heard:
            try:
                batch = self.source.batch(*key)
            except (InputError, RunError) as error:
                failed = error  # DataLoader itself would change the message
        skipped = self.data.skipped[known:] if isinstance(self.data, Skipping) else ()
        return Delivery(batch, failed, list(skipped), [str(each.message) for each in heard])


def _unchanged(item: Delivery) -> Delivery:
    return item


# --- in a worker ---


def _begin(parent: int, worker: int) -> None:
    """Prepare a worker, which has inherited blocked stop signals. parent: pid of the main process."""
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, or sends TERM as DataLoader does to a worker that does not end."""
    while os.getppid() == parent:
        found = signal.sigtimedwait({signal.SIGTERM}, WATCH)
        if found is not None and found.si_pid == parent:
            break
    os._exit(0)


# --- measuring ---


class TimedSource:
    """A source that measures how long its batches are waited for. Implements `protocols.Source`."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._seconds = 0.0

    def batch(self, step: int, rows: Rows) -> Batch:
        began = time.perf_counter()
        found = self.source.batch(step, rows)
        self._seconds += time.perf_counter() - began
        return found

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
