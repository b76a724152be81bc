"""One process on this machine for all the stages. It writes to the same terminal and is told to stop when we are.

Signals: TERM and USR1 are passed on. INT is passed on as TERM, because a terminal's Ctrl-C reaches the child by itself,
and a second INT would mean "now, without saving". If we are killed outright, the child's end of a pipe is closed, and
it saves and leaves as if TERM had come.
"""

import os
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from distill import specfile
from distill.guard import EXIT_STOPPED
from distill.launch import environment
from distill.store import RunPaths, read_json

PASSED_ON = {signal.SIGTERM: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1, signal.SIGINT: signal.SIGTERM}


class _Child:
    """The process, once there is one, and what was asked of it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.asked: list[signal.Signals] = []

    def ask(self, number: int, frame: FrameType | None) -> None:
        passed = PASSED_ON[signal.Signals(number)]
        self.asked.append(passed)
        if self.process is not None:
            self.process.send_signal(passed)


def run_stages(run: RunPaths, stages: list[str]) -> int:
    """Compute stages of a run in a process of their own: its exit code; 128 + number if a signal killed it.

    It says itself why it stopped, unless it could not: then we do.
    """
    ours, theirs = os.pipe()[::-1]  # we hold the writing end, and never write
    child = _Child()
    try:
        with _handlers(child):
            child.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "distill", "stage", str(run.root), *stages, "--lifeline", str(theirs)],
                env=_environment(run),
                pass_fds=[theirs],
            )
            os.close(theirs)
            for passed in list(child.asked):  # a signal that came before there was a process
                child.process.send_signal(passed)
            code = child.process.wait()
    finally:
        os.close(ours)
    if code >= 0:
        return code
    if signal.Signals(-code) in child.asked:
        print(f"stopped before it began; go on with: distill run {run.root} --resume", file=sys.stderr)
        return EXIT_STOPPED
    print(
        f"error: the process of run '{run.name}' was killed by {signal.Signals(-code).name} (out of memory?); "
        f"what it saved is intact; go on with: distill run {run.root} --resume",
        file=sys.stderr,
    )
    return 128 - code


def watch(lifeline: int) -> None:
    """Ask this process to stop (TERM) when the other end of a pipe is closed: the process that started it is gone."""
    os.set_inheritable(lifeline, False)

    def wait() -> None:
        os.read(lifeline, 1)  # returns only when the pipe is closed
        os.kill(os.getpid(), signal.SIGTERM)

    # The thread takes no signals: one that woke it would leave the main thread, which handles them all, asleep.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    threading.Thread(target=wait, name="lifeline", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment(run: RunPaths) -> dict[str, str]:
    """Ours, with the run's number of threads, and this very copy of the package."""
    threads = specfile.load_run(run).launch.threads or read_json(run.env)["threads"]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    # diffusers copies a student's pipeline.py there before it imports it, not atomically: one folder for each run
    env.setdefault("HF_MODULES_CACHE", str(run.root / ".modules"))
    installed = {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}
    if environment.ROOT not in installed:  # -P leaves the current folder, where we may have come from, out of the path
        env["PYTHONPATH"] = os.pathsep.join([str(environment.ROOT), *filter(None, [env.get("PYTHONPATH")])])
    return env


@contextmanager
def _handlers(child: _Child) -> Iterator[None]:
    previous = {number: signal.signal(number, child.ask) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
