"""Runs `distill track` beside a run on this machine. If it fails, the run goes on, and only a warning is printed."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from distill.core.printing import warn
from distill.launch import environment
from distill.runs.run_store import RunPaths

ENDING = 60.0  # seconds for a tracker to pass on the last events once the run has ended


@contextmanager
def tracked(run: RunPaths, trackers: Sequence[str]) -> Iterator[None]:
    """Context manager: trackers follow the run during the block. Their output goes to the run's logs.

    They are not in the process group of this terminal, so Ctrl-C does not reach them. They end when a pipe is closed:
    at the end of the block, or when this process is killed (see `local.watch`).
    """
    theirs, ours = os.pipe()
    processes = {name: _start(run, name, theirs) for name in trackers}
    os.close(theirs)
    try:
        yield
    finally:
        os.close(ours)
        for name, process in processes.items():
            if process is not None and (why := _failure(process)):
                warn(
                    f"the tracker '{name}' {why}; the run is not affected. Its output is in {_log(run, name)}. To pass "
                    f"everything on again: distill track {run.root} --to {name}"
                )


def _start(run: RunPaths, name: str, lifeline: int) -> subprocess.Popen[bytes] | None:
    command = [sys.executable, "-P", "-m", "distill", "track", str(run.root), "--to", name, "--follow"]
    env = {**os.environ, **environment.thread_variables(1), **environment.python_path()}
    try:
        run.logs.mkdir(exist_ok=True)
        with _log(run, name).open("ab") as out:
            return subprocess.Popen(
                [*command, "--lifeline", str(lifeline)], env=env, pass_fds=[lifeline], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
    except OSError as error:
        warn(f"the tracker '{name}' cannot be started: {error.strerror}; the run is not affected")
        return None


def _log(run: RunPaths, name: str) -> Path:
    return run.logs / f"track-{name}.log"


def _failure(process: subprocess.Popen[bytes]) -> str:
    """Wait for a tracker: how it failed; "" if it did not."""
    try:
        code = process.wait(ENDING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"did not end within {ENDING:.0f} s, and was killed"
    return f"failed with exit code {code}" if code else ""
