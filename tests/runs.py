"""Runs for tests: created without being executed, or executed by the real command, which can be killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def distill(*args: str, cwd: Path, timeout: float = 900, env: dict[str, str] | None = None):
    """`distill ARGS` to its end: its CompletedProcess with text output."""
    return subprocess.run(
        [sys.executable, "-m", "distill", *args],
        cwd=cwd,
        env={**ENV, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def start(*args: str, cwd: Path, log: Path) -> subprocess.Popen:
    """`distill ARGS` in a process group of its own, its output in `log`."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "distill", *args],
            cwd=cwd,
            env=ENV,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> int:
    """Send the whole process group a signal and wait: the exit code."""
    os.killpg(process.pid, number)
    return process.wait(timeout=120)


def wait_for(condition, process: subprocess.Popen, *, timeout: float = 300) -> bool:
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
