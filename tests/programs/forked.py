"""Forks test processes from a server that has already imported torch and DeepSpeed, which saves seconds per process."""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from unittest.mock import patch

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the launcher does
ENVIRONMENT = dict(os.environ)  # of the tests, before one of them changes it
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(  # names that it cannot import, such as those of this folder, it would ignore
    ["distill.cli.start", "distill.execution.stages", "distill.training.engine", "torch._dynamo", "deepspeed"]
)


class Forked:
    """`main(*arguments)` in a process of its own. Its output is added to `log`, and what it returns is its exit code.

    errors: the file for stderr; None: `log`. env: changes of the environment.
    """

    def __init__(self, main, *arguments, log, errors=None, env=None):
        self.log = log
        files = (str(log), str(errors or log))
        self.process = context.Process(target=_run, args=(main, arguments, files, env or {}))
        with patch.dict(os.environ, ENVIRONMENT, clear=True):  # the server, once started, outlives what a test sets
            self.process.start()

    @property
    def pid(self):
        return self.process.pid

    @property
    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait_until(self, reached, seconds=60):
        until = time.monotonic() + seconds
        while not reached():
            assert self.process.is_alive(), self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.001)

    def poll(self):
        """Its exit code; None while it runs."""
        return self.process.exitcode

    def send(self, number):
        os.kill(self.pid, number)

    def send_all(self, number):
        """To all of its process group, if it has one of its own."""
        os.killpg(self.pid, number)

    def end(self, seconds=120):
        """Its exit code, -N for signal N; it is killed if it does not end in time, which counts as never ending."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.said}")
        return self.process.exitcode


def command_line(arguments: tuple[str, ...], cwd: str, env: Mapping[str, str]) -> None:
    """`distill ARGUMENTS` in a folder and a process group of its own, with this environment and no other variable."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["distill", *arguments]
    from distill.cli.main import run

    run()


def _run(main, arguments, files, env):
    gc.freeze()  # what has been imported stays
    os.environ.update(env)
    for number, file in enumerate(files, start=1):  # stdout and stderr
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(*arguments))
