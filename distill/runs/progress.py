"""Progress: a live line on a terminal, plain lines elsewhere, and "progress" events in the run."""

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from distill.core.errors import Stopped
from distill.core.printing import console, say_error
from distill.core.text import printable
from distill.runs.run_store import RunPaths, append_event

EVENT_SECONDS = 5.0
# A note at the end tells that data was waited for, if the work took this long and waited for this share of the time.
LONG_SECONDS, LONG_SHARE = 60.0, 0.1
SHOWN_SHARE = 0.03  # the line shows how much time was spent waiting for data if it is at least this share


@runtime_checkable
class ProgressLine(Protocol):
    """An output for the progress line, which is updated at most once in `seconds`."""

    @property
    def seconds(self) -> float: ...
    def show(self, done: int, text: str) -> None: ...
    def say(self, text: str) -> None: ...  # above the line
    def close(self) -> None: ...


class PlainLine:
    """Prints a new line for each update, for files and pipes."""

    seconds = 10.0

    def __init__(self, label: str) -> None:
        self.label = label

    def show(self, done: int, text: str) -> None:
        self.say(f"{self.label}  {text}")

    def say(self, text: str) -> None:
        with suppress(OSError):  # the reader of stderr may have ended; the work continues, and events record it too
            say_error(f"{stamp()}  {text}")

    def close(self) -> None: ...


class LiveLine:
    """A live line with a bar. Rich is imported only when needed, since the import is a third of a command's startup."""

    seconds = 0.2

    def __init__(self, label: str, total: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        label_column = TextColumn("{task.description}", markup=False)
        columns = (label_column, BarColumn(bar_width=20), TextColumn("{task.fields[text]}", markup=False))
        self._rich = Progress(*columns, console=console(stderr=True), refresh_per_second=4)
        self._task = self._rich.add_task(printable(label), total=total, text="")
        self._rich.start()

    def show(self, done: int, text: str) -> None:
        self._rich.update(self._task, completed=done, text=printable(text))

    def say(self, text: str) -> None:
        self._rich.console.print(printable(text))

    def close(self) -> None:
        self._rich.stop()


class Means:
    """Means of named numbers since the last `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, count + 1

    def take(self) -> dict[str, float]:
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means


def stamp() -> str:
    """The current local time, as at the beginning of a log line."""
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Reports the progress of `label` towards `total` of `unit` ("images", "pairs", "samples"). A context manager.

    The rate and the remaining time count only the work of this process; `start(done)` sets where it begins. Logged
    numbers are averaged since the last report, separately for the line and for the events.
    """

    def __init__(self, label: str, total: int, unit: str, run: RunPaths | None) -> None:
        self.label, self.total, self.unit, self.run = label, total, unit, run
        self.done = 0
        self._line_means, self._event_means = Means(), Means()
        self._sink: ProgressLine = PlainLine(label)
        self._begin(0)

    def _begin(self, done: int) -> None:
        self._from = self.done = self._event_done = self._line_done = done
        self._waited = self._line_waited = self._event_waited = 0.0
        self._started = self._line_time = self._event_time = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._sink = LiveLine(self.label, self.total)
        self._begin(self.done)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        finished = kind is None or issubclass(kind, Stopped)
        if finished and self.done > self._event_done:
            self._event()
        if finished and self.done > self._line_done:
            self._line()
        seconds = time.monotonic() - self._started
        share = _share(self._waited, seconds)
        if finished and seconds >= LONG_SECONDS and share >= LONG_SHARE:
            self.note(
                f"note: {100 * share:.0f} % of the time was spent waiting for data; `distill doctor --data SPEC` says "
                "how many worker processes (launch.workers) would be enough"
            )
        self._sink.close()

    def start(self, done: int) -> None:
        """Begin at `done`. Work of earlier processes counts neither for the rate nor for the remaining time."""
        self._begin(done)

    def waited(self, seconds: float) -> None:
        """Report that the work waited this long for data, before the `update` of the same step."""
        self._waited += seconds
        self._line_waited += seconds
        self._event_waited += seconds

    def update(self, done: int, *logs: Mapping[str, float]) -> None:
        """Report that `done` of `total` are done. logs: the numbers of steps. Cheap enough for every step."""
        self.done = done
        for each in logs:
            self._line_means.add(each)
            self._event_means.add(each)
        now = time.monotonic()
        if now - self._line_time >= self._sink.seconds:
            self._line()
        # At least one event per percent. Events of long stages are less frequent in time, to keep the file small.
        patience = max(EVENT_SECONDS, (now - self._started) / 1000)
        if (done - self._event_done) * 100 >= self.total or now - self._event_time >= patience:
            self._event()

    def warn(self, text: str) -> None:
        """Print a warning above the line, and add it to the run's events."""
        self._sink.say(f"warning: {text}")
        if self.run is not None:
            append_event(self.run, "warning", label=self.label, text=text)

    def note(self, text: str) -> None:
        """Print a line above the progress, and add it to the run's events."""
        self._sink.say(text)
        if self.run is not None:
            append_event(self.run, "note", label=self.label, text=text)

    @property
    def rate(self) -> float:
        """Units per second that this process has done."""
        return (self.done - self._from) / max(time.monotonic() - self._started, 1e-9)

    def _line(self) -> None:
        now, waited = time.monotonic(), self._line_waited
        share = _share(waited, now - self._line_time)
        self._line_time, self._line_done, self._line_waited = now, self.done, 0.0
        rate = self.rate
        left = duration((self.total - self.done) / rate) if rate > 0 else "?"
        parts = [f"{self.done:,}/{self.total:,} {self.unit}", f"{rate:,.{0 if rate >= 100 else 1}f} {self.unit}/s"]
        parts += [f"ETA {left}", *([f"data {100 * share:.0f} %"] if share >= SHOWN_SHARE else [])]
        parts += [*(f"{name} {value:.4g}" for name, value in self._line_means.take().items())]
        self._sink.show(self.done, "  ".join(parts))

    def _event(self) -> None:
        now, waited = time.monotonic(), self._event_waited
        share = {"waiting": round(_share(waited, now - self._event_time), 3)} if waited else {}
        self._event_time, self._event_done, self._event_waited = now, self.done, 0.0
        logs = self._event_means.take()
        if self.run is not None:
            counts = {"unit": self.unit, "done": self.done, "total": self.total, "per_second": round(self.rate, 3)}
            append_event(self.run, "progress", label=self.label, **counts, **share, logs=logs)


def _share(part: float, whole: float) -> float:
    return min(1.0, part / max(whole, 1e-9))
