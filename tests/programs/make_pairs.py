"""For each folder on standard input, makes pairs there in a new process; prints its process id, then its exit code.

The processes are forked from this one, which has already imported everything. A test that kills one thus interrupts the
work and not the imports.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from distill.core.stop import StopRequest
from distill.pairs import generate
from distill.runs.progress import Progress
from distill.spec.model import PairsStage
from distill.testing.closed_form import class_gaussian_teacher

SHAPE = (3, 16, 16)
STAGE = PairsStage(kind="pairs", count=1500, steps=3, block=24, shard=48, solver="heun")  # 32 shards, the last short


def make(folder: Path) -> None:
    means = torch.linspace(-1, 1, 10)[:, None, None, None].expand(10, *SHAPE)
    teacher = class_gaussian_teacher(means, torch.zeros(SHAPE), torch.full(SHAPE, 0.5))
    with Progress("pairs", STAGE.count, "pairs", None) as progress, StopRequest() as stop:
        generate(teacher, STAGE, folder, seed=5, device=torch.device("cpu"), progress=progress, stop=stop)


def serve(make: Callable[[Path], None]) -> None:
    torch.set_num_threads(1)  # a fork has no threads but its own
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            code = 1
            try:
                make(Path(line.strip()))
                code = 0
            finally:  # never back into the loop
                if code:
                    traceback.print_exc()
                os._exit(code)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    serve(make)
