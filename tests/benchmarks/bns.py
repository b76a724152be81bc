"""Fitted solvers (BNS) on the digits teacher: RMS errors beside those of ab2, on samples that are not fitted."""

import tempfile
import time
from pathlib import Path

import torch

from distill.flow.solvers import solve
from distill.spec.model import CheckpointTeacher
from distill.students import fitted, fitting
from distill.teachers import load_teacher

from .others import rms
from .solvers import digits, trained

STEPS, PAIRS = (4, 6, 8), 128


def lines(teacher: Path) -> list[str]:
    field, noise, cond, truth = digits(teacher)
    loaded, found = load_teacher(CheckpointTeacher(path=str(teacher)), torch.device("cpu")), []
    for steps in STEPS:
        began = time.perf_counter()
        fit = fitting.fit(loaded, steps, device=torch.device("cpu"), samples=PAIRS)
        seconds = time.perf_counter() - began
        ours = rms(fitted.method(loaded, fit).generate(noise, cond, []) - truth)
        ab2 = rms(solve(field, noise, cond, solver="ab2", steps=steps) - truth)
        found.append(f"{steps} steps: bns {ours:.4f}, ab2 {ab2:.4f}, ratio {ours / ab2:.2f}; fitted in {seconds:.0f} s")
    return found


def bench_bns() -> str:
    """Fits solvers to the digits teacher, which it trains first."""
    with tempfile.TemporaryDirectory() as folder:
        found = lines(trained(Path(folder)))
    return "\n    ".join([f"bns     {PAIRS} pairs; goal with 4 steps: ratio <= 0.75", *found])
