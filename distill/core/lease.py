"""A claim is renewed while it is held; once it is no longer its own, this process ends before it writes more.

Whether a process of another host or container is alive cannot be looked up. Others go by the age of its last renewal:
the modification time of the claim's record, by the clock of the file system that holds it, since hosts' clocks differ.
A process that was suspended for longer than that limit may find afterwards that another process has taken over.

Who takes over by age moves the claim to a name made from the renewal that it was judged by (its grave), and a renewal
that comes late first takes that name itself. Only one of the two succeeds, whatever happens between their steps.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from distill.core import records
from distill.core.errors import InputError

EVERY = 30.0  # seconds between two renewals
MISSED = 4  # so many times that: the age at which a claim counts as given up, 120 s
LATE = 2  # so many times that: a renewal after longer than this may come too late
TICKS = 30  # looks between two renewals, so that the one that is due when a laptop wakes up is made at once

_held: list["Lease"] = []  # by this process
os.register_at_fork(after_in_child=_held.clear)  # a child has no thread that renews, and claims nothing for its parent


def confirm() -> None:
    """Call it before writing to a run: ends this process if a claim that it held is gone. Nearly free."""
    for lease in list(_held):
        lease.confirm()


class Lease:
    """The renewals of one claim, made by a thread.

    record: the claim's file. content: of the file, as long as the claim is ours. every: seconds between two renewals.
    grave: where a process that judges the claim by a renewal (nanoseconds) moves it. lost: called once it is gone.
    """

    def __init__(
        self, record: Path, content: bytes, every: float, grave: Callable[[int], Path], lost: Callable[[], NoReturn]
    ) -> None:
        self._record, self._content, self._every, self._grave, self._lost = record, content, every, grave, lost
        self._confirmed = 0.0  # when it was last known to be ours, by our clock
        self._overdue: set[int] = set()  # renewals after which the next one came late, and whose graves are still free
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)

    def start(self) -> None:
        """Renew at once, and from now on."""
        self._try_to_renew()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread takes them all
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _held.append(self)

    def stop(self) -> None:
        """Renew no more."""
        _held.remove(self)
        self._ended.set()
        self._thread.join()

    def confirm(self) -> None:
        """Renew if that is overdue, as after a suspension."""
        if _now() - self._confirmed > LATE * self._every:
            self._try_to_renew()

    def _keep(self) -> None:
        while not self._ended.wait(self._every / TICKS):
            if _now() - self._confirmed >= self._every:
                self._try_to_renew()

    def _try_to_renew(self) -> None:
        """What the file system refuses for a moment is tried again at the next look."""
        with self._lock, suppress(OSError, InputError):
            self._renew()

    def _renew(self) -> None:
        began = _now()
        try:
            with records.open_regular(self._record) as file:
                if file.read(len(self._content) + 1) != self._content:
                    self._lost()
                before = os.fstat(file.fileno()).st_mtime_ns
                os.utime(file.fileno())  # by the clock of the file system; needs no room on the disk
                after = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            self._lost()
        if not 0 <= after - before <= LATE * self._every * 1e9:
            self._overdue.add(before)
        for moment in sorted(self._overdue):
            try:
                os.close(os.open(self._grave(moment), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                self._lost()
            self._overdue.remove(moment)
        self._confirmed = began


def _now() -> float:
    """Seconds by a clock that also counts while the machine sleeps, where there is one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()
