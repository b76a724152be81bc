"""Runs one module of this package, or one file, in a new Python process, and waits for it."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from distill.core.errors import RunError
from distill.launch import environment

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
FOR_PYTHON = ("PYTHON", "HF_")  # how the names of variables begin that an isolated process does not get


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


def run_isolated(file: Path, folder: Path, *arguments: str, seconds: float) -> Ended:
    """Run `python -I FILE N PLACES ARGUMENTS` in `folder`. Its stdout is discarded.

    N is a pipe that is closed when this process ends, however it ends. PLACES are the folders in which this process
    finds packages, without that of this package: FILE is to add them to sys.path. The process gets no PYTHONPATH. The
    Hugging Face libraries are offline there, and their cache is empty. RunError if the process has not ended after
    `seconds`; it is then killed.
    """
    theirs, ours = os.pipe()  # this process keeps the write end open, and never writes to it
    places = [path for path in sys.path if path and Path(path).is_absolute() and Path(path) != environment.ROOT]
    command = [sys.executable, "-I", str(file.resolve()), str(theirs), os.pathsep.join(places), *arguments]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOR_PYTHON)}
    own = {**OFFLINE, "HF_HOME": str(folder / ".cache")}
    try:
        done = subprocess.run(
            command,
            env={**inherited, **environment.thread_variables(environment.threads()), **own},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs],
            start_new_session=True,  # a stop signal to our group of processes is not for this one
            timeout=seconds,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"a process that loads files has not ended after {seconds:g} seconds, and was killed") from None
    finally:
        os.close(ours)
        os.close(theirs)
    return Ended(done.returncode, done.stderr)
