"""Stopping by a signal: the current step is finished and saved, then the process exits with code 75."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

from distill.core.errors import Stopped

Handler = Callable[[int, FrameType | None], object] | int | None
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # scheduler's kill, Ctrl-C, Slurm's --signal=USR1@seconds


class StopRequest:
    """Context manager that records the first stop signal. A second SIGINT raises KeyboardInterrupt, without saving."""

    def __init__(self) -> None:
        self.signal: str | None = None  # name of the first signal
        self._interrupts = 0
        self._previous: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def share(self, asked: bool) -> None:
        """Record that some rank received a signal, so that all ranks stop at the same step."""
        if asked and self.signal is None:
            self.signal = "a signal to another rank"

    def raise_if_requested(self, saved: str) -> None:
        """Raise Stopped if a signal was received. Call it only after saving.

        saved: what was saved, for the message.
        """
        if self.signal is not None:
            raise Stopped(f"stopped by {self.signal}; saved: {saved}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.signal is None:
            self.signal = signal.Signals(number).name
            with suppress(OSError):  # stderr may be closed
                os.write(2, f"\n{self.signal}: saving, then stopping (Ctrl-C twice: stop at once)\n".encode())
