"""Forks test processes from a server that has already imported torch and DeepSpeed, which saves seconds per process."""

import multiprocessing
import os
import signal
import sys
import time

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the launcher does
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["distill.training.engine", "torch._dynamo", "deepspeed", "diffusers"])


class Forked:
    """`main(*arguments)` in a process of its own; what it says is added to a file, what it returns is its exit code."""

    def __init__(self, main, *arguments, log, env=None):
        self.log = log
        self.process = context.Process(target=_run, args=(main, arguments, str(log), env or {}))
        self.process.start()

    @property
    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait_until(self, reached, seconds=60):
        until = time.monotonic() + seconds
        while not reached():
            assert self.process.is_alive(), self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.001)

    def send(self, number):
        os.kill(self.process.pid, number)

    def end(self, seconds=120):
        """Its exit code, -N for signal N; it is killed if it does not end in time, which counts as never ending."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.said}")
        return self.process.exitcode


def _run(main, arguments, log, env):
    os.environ.update(env)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(*arguments))
