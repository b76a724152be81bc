"""Stop requests and progress: what is counted, printed and recorded."""

import os
import pty
import re
import signal
import subprocess
import sys
from datetime import datetime, timedelta

import pytest

from distill.core.errors import RunError, Stopped
from distill.core.stop import StopRequest
from distill.runs import progress as progress_module
from distill.runs.progress import Means, Progress, duration
from distill.runs.run_store import RunPaths, read_events

STAMPED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  (.*)", re.DOTALL)


@pytest.fixture
def clock(monkeypatch):
    """A clock the test moves."""

    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress_module.time, "monotonic", clock)
    return clock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_noted_and_raised_only_where_asked(number, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.raise_if_requested("nothing")
        os.kill(os.getpid(), number)
        assert stop.signal == number.name
        with pytest.raises(Stopped, match=f"^stopped by {number.name}; saved: step 7$"):
            stop.raise_if_requested("step 7")
    assert signal.getsignal(number) is before
    assert f"{number.name}: saving, then stopping" in capfd.readouterr().err


def test_the_second_interrupt_does_not_wait():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGTERM"  # the first reason stays
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_means_are_since_they_were_taken():
    means = Means()
    means.add({"loss": 1.0, "norm": 5.0})
    means.add({"loss": 3.0})
    assert means.take() == {"loss": 2.0, "norm": 5.0}
    assert means.take() == {}


def test_durations():
    assert [duration(s) for s in (0.0, 59.6, 61.0, 3661.0, 90000.0)] == ["0:00", "1:00", "1:01", "1:01:01", "25:00:00"]


def test_plain_lines_are_throttled_averaged_and_exclude_the_resumed_part(clock, capsys):
    with Progress("teach", 1000, "images", None) as progress:
        progress.start(500)
        for step in range(1, 5):
            clock.now += 4
            progress.update(500 + 40 * step, {"loss": float(step)})
    said = [STAMPED.fullmatch(line).groups() for line in capsys.readouterr().err.splitlines()]
    for moment, _ in said:
        assert abs(datetime.now() - datetime.fromisoformat(moment)) < timedelta(seconds=30)
    assert [line for _, line in said] == [
        "teach  620/1,000 images  10.0 images/s  ETA 0:38  loss 2",  # mean of 1, 2, 3; 120 images in 12 s
        "teach  660/1,000 images  10.0 images/s  ETA 0:34  loss 4",
    ]


def test_events_come_every_hundredth_or_five_seconds(tmp_path, clock, capsys):
    run = RunPaths(tmp_path)
    with Progress("pairs", 1000, "pairs", run) as progress:
        for done in range(1, 31):  # a hundredth is 10
            progress.update(done, {"loss": float(done)})
        clock.now += 5
        progress.update(31, {})
        progress.update(32, {})
    events = list(read_events(run))
    assert [(e["event"], e["label"], e["unit"], e["done"], e["total"]) for e in events] == [
        ("progress", "pairs", "pairs", done, 1000) for done in (10, 20, 30, 31, 32)
    ]
    assert [e["logs"] for e in events] == [{"loss": 5.5}, {"loss": 15.5}, {"loss": 25.5}, {}, {}]


def test_long_runs_wait_longer_between_events(tmp_path, clock, capsys):
    with Progress("teach", 10**9, "images", RunPaths(tmp_path)) as progress:
        for done in range(1, 20_000):
            clock.now += 20  # four and a half days
            progress.update(done, {})
    assert 1000 < len(list(read_events(RunPaths(tmp_path)))) < 6000


def test_a_warning_is_said_and_noted(tmp_path, capsys):
    with Progress("teach", 10, "images", RunPaths(tmp_path)) as progress:
        progress.warn("[bold]checkpoint[/] damaged")
    assert STAMPED.fullmatch(capsys.readouterr().err)[2] == "warning: [bold]checkpoint[/] damaged\n"
    assert [e["text"] for e in read_events(RunPaths(tmp_path))] == ["[bold]checkpoint[/] damaged"]


def test_events_that_cannot_be_written_are_one_message(tmp_path, capsys):
    progress = Progress("teach", 10, "images", RunPaths(tmp_path / "gone"))
    with pytest.raises(RunError, match=r"cannot write .*gone/events/[0-9a-f]{24}\.jsonl: No such file or directory"):
        progress.update(10, {})


def test_neither_torch_nor_rich_is_imported_for_plain_lines():
    code = "import sys, distill.runs.progress, distill.core.stop\n"
    code += "print([m for m in ('torch', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_terminal_gets_one_live_line():
    code = (
        "from distill.runs.progress import Progress\n"
        "with Progress('teach', 100, 'images', None) as p:\n"
        "    p.update(50, {'loss': 0.25}); p.warn('mind [this]'); p.update(100, {'loss': 0.75})\n"
    )
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env={**os.environ, "COLUMNS": "200", "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # the terminal is closed
        pass
    assert b"warning: mind [this]" in shown
    assert b"100/100 images" in shown and b"loss 0.5" in shown and b"ETA 0:00" in shown
