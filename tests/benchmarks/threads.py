"""How long threads that wait may spin: a training step on an idle machine, and beside processes that want its cores."""

import json
import os
import statistics
import subprocess
import sys
import time

from distill.launch import environment

BUSY = "while True: pass"
POLICIES = {
    "unbounded": {},
    "bounded": {"GOMP_SPINCOUNT": str(environment.SPINS)},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}


def steps(count: int) -> None:
    """In a process of its own: seconds of each of `count` training steps of the digits preset's network, as JSON."""
    import torch

    from distill.flow.draws import Rows, StepDraw
    from distill.spec.model import UNetSpec
    from distill.students.init import StudentInit

    student = StudentInit(None, UNetSpec(kind="unet", channels=[32, 48]), (1, 8, 8), 10, 0).velocity_field().train()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3, fused=True)
    like, labels, taken = torch.zeros(128, 1, 8, 8), torch.arange(128) % 10, []
    for step in range(count):
        began = time.perf_counter()
        draw = StepDraw(0, step, 0, Rows(0, 128, 128))
        student(draw.normal("x", like), draw.uniform("t", like), {"class_labels": labels}).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - began)
    print(json.dumps(taken[2:]))


def measured(policy: dict[str, str], count: int) -> list[float]:
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env |= {"OMP_NUM_THREADS": str(environment.cpus()), **policy}
    code = f"from tests.benchmarks.threads import steps; steps({count})"
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def bench_threads(rounds: int = 3) -> str:
    """Medians over rounds in turn: idle, then beside as many busy processes as there are CPUs."""
    idle: dict[str, list[float]] = {name: [] for name in POLICIES}
    beside: dict[str, list[float]] = {name: [] for name in POLICIES}
    for _ in range(rounds):
        for name, policy in POLICIES.items():
            idle[name] += measured(policy, 30)
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(environment.cpus())]
    try:
        for _ in range(rounds):
            for name, policy in POLICIES.items():
                beside[name] += measured(policy, 8)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    alone = statistics.median(idle["unbounded"])
    rows = [
        f"{name} {statistics.median(idle[name]) / alone:.2f} idle, {statistics.median(beside[name]) / alone:.1f} busy"
        for name in POLICIES
    ]
    return (
        f"threads a step, times that of an idle machine ({1000 * alone:.0f} ms): {'; '.join(rows)} (goal idle <= 1.03)"
    )
