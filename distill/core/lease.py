"""Renewal of claims (see `runs.claims`). A process that has lost its claim ends before it writes anything more.

Whether a process of another host or container is alive cannot be looked up. Other processes judge it by the age of its
last renewal. A renewal sets the modification time of the claim's record, by the clock of its file system, since the
clocks of hosts differ. A process that was suspended for too long may thus have lost its claim to another process.

A claim cannot both be taken over because of its age and be renewed late. The process that takes over renames the claim
to its grave, a name made from the last renewal that it saw. A late renewal counts only if it can create that name
itself. Only one of the two can succeed, in whatever order their steps happen.
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
MISSED = 4  # a claim counts as given up if its last renewal is older than MISSED * EVERY (120 s)
LATE = 2  # a renewal is late if the one before is older than LATE * EVERY
TICKS = 30  # checks per interval, so that an overdue renewal is made soon after a suspended machine wakes up

_held: list["Lease"] = []  # the leases of this process
os.register_at_fork(after_in_child=_held.clear)  # a forked child has no renewing thread; the claim is its parent's


def confirm() -> None:
    """Call this before writing to a run. Ends this process if it has lost a claim. Cheap if no renewal is overdue."""
    for lease in list(_held):
        lease.confirm()


class Lease:
    """Renews one claim from a thread.

    record: the file of the claim. content: its content as long as this process holds the claim.
    every: seconds between two renewals. grave: renewal time (nanoseconds) -> the path to which a process moves the
    claim if it takes over because that renewal is too old. lost: called when the claim is lost.
    """

    def __init__(
        self, record: Path, content: bytes, every: float, grave: Callable[[int], Path], lost: Callable[[], NoReturn]
    ) -> None:
        self._record, self._content, self._every, self._grave, self._lost = record, content, every, grave, lost
        self._confirmed = 0.0  # when this process last verified that it holds the claim, see `_now`
        self._overdue: set[int] = set()  # renewals before a late one; this process must still create their graves
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)

    def start(self) -> None:
        """Renew now, and start the thread that renews."""
        self._try_to_renew()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread handles all signals
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _held.append(self)

    def stop(self) -> None:
        """Stop renewing."""
        _held.remove(self)
        self._ended.set()
        self._thread.join()

    def confirm(self) -> None:
        """Renew if the renewal is overdue, as after a suspension."""
        if _now() - self._confirmed > LATE * self._every:
            self._try_to_renew()

    def _keep(self) -> None:
        while not self._ended.wait(self._every / TICKS):
            if _now() - self._confirmed >= self._every:
                self._try_to_renew()

    def _try_to_renew(self) -> None:
        """Renew. If the file system fails, the thread tries again at its next check."""
        with self._lock, suppress(OSError, InputError):
            self._renew()

    def _renew(self) -> None:
        began = _now()
        try:
            with records.open_regular(self._record) as file:
                if file.read(len(self._content) + 1) != self._content:
                    self._lost()
                before = os.fstat(file.fileno()).st_mtime_ns
                os.utime(file.fileno())  # sets the time by the clock of the file system; needs no disk space
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
    """Seconds of a monotonic clock. On Linux it also counts while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()
