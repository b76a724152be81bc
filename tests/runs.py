"""Runs for tests: created without being executed, or executed by the real command, which can be killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from programs.forked import Forked, command_line

from distill.core.versions import DRAWS
from distill.exchange.student_card import StudentCard
from distill.runs.run_store import CREATED, RunPaths, create_run, event_line
from distill.spec import presets, specfile

CARD = StudentCard(
    name="a", recipe="reflow/reflow", spec_digest="0" * 64, teacher_digest=None, num_classes=None, null_class=None,
    shape=(2,), weights="raw", images=64, metrics={"SW2@1": 0.5},
)  # fmt: skip
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def make_run(store: Path, name: str = "one", preset: str = "digits", *changes: str, threads: int = 1) -> RunPaths:
    """A new run of a preset, of which nothing is done yet."""
    spec = specfile.load(presets.find(preset), changes, name=name).spec
    kinds = {stage: each.kind for stage, each in spec.stages.items()}
    files = {
        "spec.yaml": specfile.resolved(spec),
        "env.json": json.dumps({"threads": threads, "draws": DRAWS}),
        CREATED: event_line("created", digest=spec.digest(), stages=kinds),
    }
    return create_run(store, name, files)


def distill(
    *args: str, cwd: Path, timeout: float = 900, env: dict[str, str] | None = None, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """`distill ARGS` to its end.

    It is forked from a process that has already imported torch; the processes that it starts import for themselves.
    fresh: a new interpreter runs it instead, as when a user types it, which takes seconds longer.
    """
    env = {**ENV, **(env or {})}
    if fresh:
        return subprocess.run(
            [sys.executable, "-m", "distill", *args],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        code = Forked(command_line, args, str(cwd), env, log=out, errors=err).end(timeout)
        return subprocess.CompletedProcess(args, code, out.read_text(), err.read_text())


def start(*args: str, cwd: Path, log: Path, env: Mapping[str, str] | None = None) -> Forked:
    """`distill ARGS`, forked as by `distill`, its output in `log`."""
    return Forked(command_line, args, str(cwd), {**ENV, **(env or {})}, log=log)


def kill(process: Forked, number: int = signal.SIGKILL) -> int:
    """Send the whole process group a signal and wait: the exit code."""
    process.send_all(number)
    return process.end()


def alive(pid: int) -> bool:
    """Whether a process still runs. A zombie, which its parent has not waited for, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it ended before the file was opened, or read
        return False


def wait_for(condition, process: Forked | subprocess.Popen, *, timeout: float = 300) -> bool:
    """Until `condition()` holds or the process ends: whether it held."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return condition()
        time.sleep(0.02)
    raise TimeoutError(f"nothing happened for {timeout:.0f} s")


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
