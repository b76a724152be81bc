"""Starts processes on this machine for the stages of a run, and forwards stop signals to them.

All stages use `launch.procs` ranks. Rank 0 prints to the terminal, the others write to the run's logs. The processes
hold one end of a pipe. If this parent process is killed, the pipe is closed, and they save and exit as after a TERM
signal.
"""

import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.core.errors import EXIT_FAILED, EXIT_STOPPED
from distill.launch import environment, ranks
from distill.runs import machine, todo
from distill.runs.run_store import RunPaths
from distill.spec.model import RunSpec

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_stages(run: RunPaths, stages: list[str], *, measure: bool = False) -> int:
    """Compute stages of a run in new processes; returns 0, or the exit code of the first group that failed or stopped.

    The processes themselves print why they stopped; this function prints it if they could not. measure: record the
    memory use, in a temporary run.
    """
    with ranks.Relay() as relay:
        spec, ending = todo.load_spec(run), ranks.MEASURED if measure else None
        for names in groups(stages, spec.cache):
            if relay.asked:
                ranks.say_not_begun(run, ending=ending)
                return EXIT_STOPPED
            command = ["distill", "stage", str(run.root), *names, *(["--measure"] if measure else [])]
            code = _run(run, command, _environments(run, spec), relay, ending=ending)
            if code:
                return code
            if not measure and not all(run.stage(name).done.exists() for name in names):
                ranks.say_left(run, 0)
                return EXIT_FAILED
    return 0


def run_ranks(
    folder: Path,
    module: str,
    *arguments: str,
    size: int,
    threads: int = 1,
    ending: str = ranks.MEASURED,
    apart: bool = False,
) -> int:
    """Run `python -m module ARGUMENTS --lifeline N` in `size` ranks; returns the exit code.

    folder: for their logs. threads: of each rank. ending, apart: see `ranks.run`.
    """
    with ranks.Relay() as relay:
        envs = _of_ranks(_own(folder, threads), size)
        return _run(RunPaths(folder), [module, *arguments], envs, relay, ending=ending, apart=apart)


def _run(
    run: RunPaths,
    command: Sequence[str],
    envs: Sequence[Mapping[str, str]],
    relay: ranks.Relay,
    *,
    ending: str | None = None,
    apart: bool = False,
) -> int:
    theirs, ours = os.pipe()  # this process keeps the write end open, and never writes to it
    try:
        python = [sys.executable, "-P", "-m", *command, "--lifeline", str(theirs)]
        return ranks.run(run, python, theirs, envs, relay, ending=ending, apart=apart)
    finally:
        os.close(ours)
        os.close(theirs)


def groups(stages: list[str], cache: str | None) -> list[list[str]]:
    """Consecutive stages that the same processes compute.

    The cache stage has processes of its own, so that the memory of its encoders is free when other stages begin.
    """
    return [list(names) for _, names in itertools.groupby(stages, key=lambda name: name == cache)]


def watch(lifeline: int) -> None:
    """Send TERM to this process when the other end of a pipe is closed, that is, when its parent process has ended."""
    os.set_inheritable(lifeline, False)

    def wait() -> None:
        os.read(lifeline, 1)  # returns only when the pipe is closed
        os.kill(os.getpid(), signal.SIGTERM)

    # The thread blocks all these signals. If it received one, the main thread, which handles them, would not wake up.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ranks.PASSED_ON)
    threading.Thread(target=wait, name="lifeline", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environments(run: RunPaths, spec: RunSpec) -> list[dict[str, str]]:
    """The environment of each process. The threads are divided among the processes."""
    size = spec.launch.procs
    threads = machine.load(run).threads or environment.threads()
    env = _own(run.root, spec.launch.threads or max(1, threads // size))
    return [env] if size == 1 and spec.launch.zero_stage is None else _of_ranks(env, size)


def _own(folder: Path, threads: int) -> dict[str, str]:
    """The environment of this process, changed so that a new process imports the same copy of the package."""
    env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    env |= environment.thread_variables(threads)
    # diffusers copies a student's pipeline.py there before it imports it, not atomically: each process needs its own
    env.setdefault("HF_MODULES_CACHE", str(folder / ".modules"))
    return env | environment.python_path()


def _of_ranks(env: Mapping[str, str], size: int) -> list[dict[str, str]]:
    modules, port = Path(env["HF_MODULES_CACHE"]), _free_port()
    return [
        {
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # a lost connection is reported once, without a C++ stack trace
            **env,
            "HF_MODULES_CACHE": str(modules / f"rank-{rank}"),
            **dict(zip(RANK_VARIABLES, map(str, (rank, rank, size, size, "127.0.0.1", port)), strict=True)),
        }
        for rank in range(size)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
