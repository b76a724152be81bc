"""Runs one process, or several ranks that train together, and stops them together.

Signals: TERM and USR1 are forwarded to all processes. INT is forwarded as TERM: Ctrl-C in a terminal already sends INT
to every process, and a second INT means to stop immediately, without saving.

Failures: ranks wait for each other, so no rank can continue after one has failed. The others have a few seconds to
report this, and are then killed. The exit code of all is that of the first rank that failed by itself.
"""

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from distill.core.errors import EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED, EXIT_PEER, EXIT_STOPPED, RunError
from distill.core.printing import say_error
from distill.core.stop import Handler
from distill.runs.run_store import RunPaths, append_event

PASSED_ON = {signal.SIGTERM: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1, signal.SIGINT: signal.SIGTERM}
STOPPING = 120.0  # seconds for the other ranks to save and exit once a rank has stopped
FAILING = 10.0  # seconds for the other ranks to exit by themselves once a rank has failed
POLL = 0.02  # seconds between two checks of the processes
# A process that exits with one of these codes has reported why.
OURS = (0, EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED, EXIT_PEER, EXIT_INTERRUPTED)
WEIGHTS = {EXIT_STOPPED: 1, EXIT_PEER: 2, 0: 3}  # the lowest weight decides; any other code is a failure with weight 0
MEASURED = "this was a temporary run for measurements, and nothing was saved"  # in messages about a temporary run
LAST_LINES, LAST_BYTES = 20, 64 * 1024  # at most this much of the end of a log is shown


class Relay:
    """Context manager that forwards signals to the current processes, and to those that are started later."""

    def __init__(self, passed_on: Mapping[signal.Signals, signal.Signals] = PASSED_ON) -> None:
        self.passed_on = passed_on
        self.processes: list[subprocess.Popen[bytes]] = []
        self.asked: list[signal.Signals] = []
        self._previous: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._ask) for number in self.passed_on}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def add(self, process: subprocess.Popen[bytes]) -> None:
        self.processes.append(process)
        for passed in list(self.asked):  # signals that arrived before this process was started
            process.send_signal(passed)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        passed = self.passed_on[signal.Signals(number)]
        self.asked.append(passed)
        for process in self.processes:
            process.send_signal(passed)


@dataclass(frozen=True)
class Log:
    """The output of a process: its log file from offset `begin`."""

    path: Path
    begin: int

    @classmethod
    def open(cls, path: Path) -> "Log":
        try:
            path.parent.mkdir(exist_ok=True)
            path.touch()
            return cls(path, path.stat().st_size)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}; nothing was changed") from error

    def last_lines(self) -> list[str]:
        with self.path.open("rb") as file:
            file.seek(max(self.begin, self.path.stat().st_size - LAST_BYTES))
            return file.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]


def run(
    paths: RunPaths,
    command: Sequence[str],
    lifeline: int,
    envs: Sequence[Mapping[str, str]],
    relay: Relay,
    *,
    ending: str | None = None,
    apart: bool = False,
) -> int:
    """Run a command in one process for each of `envs`, wait for all, and return the exit code.

    The exit code is 128 + its number if a process was killed by a signal. Rank 0 prints to the terminal; the output of
    the other ranks goes to logs. Raises RunError if a process cannot be started or a log cannot be written.

    lifeline: an open file descriptor that the processes inherit, see `local.watch`. ending: of messages about a stop or
    a failure, if the run is temporary; None: how to resume it. apart: the processes do not work together, so that one
    that is done says nothing about the others.
    """
    logs = {rank: Log.open(paths.log(rank)) for rank in range(1, len(envs))}
    relay.processes = []
    try:
        for rank, env in enumerate(envs):
            relay.add(_start(command, env, lifeline, logs.get(rank)))
    except OSError as error:
        for process in relay.processes:
            process.kill()
        raise RunError(f"cannot start a process: {error.strerror}; what was saved is intact") from error
    ended = _wait(relay, apart=apart)
    # A process that was killed by a forwarded signal had no handler yet. It counts as stopped.
    meant = {rank: EXIT_STOPPED if -code in relay.asked else code for rank, code in ended.items()}
    # The first rank with the lowest weight. If all refuse the input, it is rank 0, which has printed the reason.
    rank = min(meant, key=lambda rank: (WEIGHTS.get(meant[rank], 0), meant[rank] == EXIT_INPUT and rank > 0))
    code = meant[rank]
    if code == EXIT_STOPPED and ended.get(0) != EXIT_STOPPED:
        _say_stopped(paths, began=meant == ended, ending=ending)
    if code not in (0, EXIT_STOPPED) and rank > 0:
        _say_failed(paths, rank, code, logs[rank])
    if code == EXIT_PEER:
        say_error(f"the logs of the other ranks are in {logs[1].path.parent}")
    if code >= 0:
        if rank == 0 and code not in OURS:
            say_left(paths, code, ending=ending)
        return code
    who = "the process" if len(envs) == 1 else f"rank {rank}"
    whose = "" if ending else f" of run '{paths.name}'"
    say_error(
        f"error: {who}{whose} was killed by {signal.Signals(-code).name} (out of memory?); "
        f"{ending or f'what it saved is intact; {_onward(paths)}'}"
    )
    return 128 - code


def say_left(paths: RunPaths, code: int, *, ending: str | None = None) -> None:
    """Report a process that ended before its work was done, with an exit code that does not say why."""
    message = (
        f"a process exited with code {code} before its stage was done (does a recipe or library call exit or os._exit?)"
    )
    append_event(paths, "failed", message=message)
    onward = ending or f"what it saved is intact; {_onward(paths)}"
    where = "" if ending else f"run '{paths.name}': "
    say_error(f"error: {where}{message}; {onward}")


def say_not_begun(paths: RunPaths, *, ending: str | None = None) -> None:
    """Report that the processes were stopped before they could handle signals."""
    say_error(f"stopped before it had started; {ending or _onward(paths)}")


def _onward(paths: RunPaths) -> str:
    return f"resume with: distill run {paths.root} --resume"


def _start(command: Sequence[str], env: Mapping[str, str], lifeline: int, log: Log | None) -> subprocess.Popen[bytes]:
    if log is None:
        return subprocess.Popen(command, env=env, pass_fds=[lifeline])
    with log.path.open("ab") as out:
        return subprocess.Popen(command, env=env, pass_fds=[lifeline], stdout=out, stderr=subprocess.STDOUT)


def _wait(relay: Relay, *, apart: bool) -> dict[int, int]:
    """Rank -> exit code, in the order in which the ranks ended, without those that had to be killed.

    They are killed if they do not end soon after another one; but see `run` for apart.
    """
    ended: dict[int, int] = {}
    deadline = inf
    while len(ended) < len(relay.processes):
        for rank, process in enumerate(relay.processes):
            code = process.poll()
            if code is not None and rank not in ended:
                ended[rank] = code
                if code or not apart:
                    deadline = min(deadline, time.monotonic() + _patience(code))
        if time.monotonic() > deadline:
            for process in relay.processes:
                process.kill()
            for process in relay.processes:
                process.wait()
            break
        time.sleep(POLL)
    return ended


def _patience(code: int) -> float:
    return STOPPING if code in (0, EXIT_STOPPED) else FAILING


def _say_stopped(paths: RunPaths, *, began: bool, ending: str | None) -> None:
    """Report a stop that rank 0 could not report itself."""
    if not began:
        say_not_begun(paths, ending=ending)
        return
    append_event(paths, "stopped", message="rank 0 did not report the stop")
    say_error(f"stopped; {ending or f'what was saved is intact; {_onward(paths)}'}")


def _say_failed(paths: RunPaths, rank: int, code: int, log: Log) -> None:
    """Report the failure of a rank other than 0."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    lines = log.last_lines()
    if lines or code >= 0:
        say_error(f"rank {rank}: " + ("\n".join(lines) or f"{how} without a message"))
    append_event(paths, "failed", message=f"rank {rank}: {lines[-1] if lines else how}")
