"""Runs one module of this package in a new Python process, and waits for it."""

import os
import subprocess
import sys
from dataclasses import dataclass

from distill.launch import environment


@dataclass(frozen=True)
class Ended:
    """A process that has ended. code: its exit code, or minus the number of the signal that ended it."""

    code: int
    errors: str  # what it printed on stderr


def run(module: str, *arguments: str) -> Ended:
    """Run `python -m MODULE ARGUMENTS`. Its stdout is discarded."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, **environment.python_path()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    return Ended(done.returncode, done.stderr)
