"""Random numbers of training: what a process pays for its own rows of a large batch."""

import statistics
import time
from collections.abc import Callable

import torch

from distill.flow.draws import Rows, StepDraw

LATENT = (4, 64, 64)


def cpu_seconds(work: Callable[[], object], rounds: int = 30) -> float:
    """The median of the CPU time of one call, after a first that is not counted."""
    work()
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def bench_draws() -> str:
    """Eight rows of latents, of batches that grow, against torch.randn of these rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting threads use the CPU, too
    like = torch.empty(8, *LATENT)
    plain = cpu_seconds(lambda: torch.randn(8, *LATENT))
    ratios = {}
    for total in (8, 512, 65_536):
        rows = Rows(total - 8, total, total)
        ratios[total] = cpu_seconds(lambda rows=rows: StepDraw(0, 1, 0, rows).normal("noise", like)) / plain
    torch.set_num_threads(threads)
    shown = ", ".join(f"of {total:,}: {ratio:.1f}" for total, ratio in ratios.items())
    return f"draws   8 latents of 4 x 64 x 64, times torch.randn of them, by batch: {shown} (goal <= 3, flat)"
