"""Stopping on request: a signal is recorded, the step is finished and saved, and the process exits with code 75."""

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
    """Notes the first signal while entered; a second SIGINT raises KeyboardInterrupt at once, saving nothing."""

    def __init__(self) -> None:
        self.signal: str | None = None  # name of the signal that asked
        self._interrupts = 0
        self._previous: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def share(self, asked: bool) -> None:
        """Take over that a rank was asked, so that all of them stop at the same step."""
        if asked and self.signal is None:
            self.signal = "a signal to another rank"

    def raise_if_requested(self, saved: str) -> None:
        """Leave if a signal has come; call it where nothing would be lost. `saved`: where the work stands."""
        if self.signal is not None:
            raise Stopped(f"stopped by {self.signal}; saved: {saved}; run the same command again to resume")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.signal is None:
            self.signal = signal.Signals(number).name
            with suppress(OSError):  # nobody may be there to read it
                os.write(2, f"\n{self.signal}: saving, then stopping (Ctrl-C twice: stop at once)\n".encode())
