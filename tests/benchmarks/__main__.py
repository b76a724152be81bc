"""Measurements, as ratios within one run: python -m tests.benchmarks [NAME ...]; the names stand in BENCHES below.

Nothing is asserted: machines are noisy. Contenders take turns, medians are compared. Without names, the quick ones run.
`quickstart` takes 5 minutes on 2 cores, `digits` (the bar, mean of three seeds) 20, `flowturbo` and `zero` 15,
`guidance` 25, `bns` and `solvers` 10, `schedules` 4, `reading` and `waves` 3, `shards` 2; `runs` makes a store of 2,000
runs, `looks` a run of a million events; `checkpoint` and `pull` need 4 GB of disk.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from distill.core.stop import StopRequest
from distill.data import DataSource, load_data
from distill.flow.draws import Rows
from distill.networks.velocity import VelocityStudent
from distill.protocols import Batch
from distill.runs.progress import Progress
from distill.runs.results import load_results
from distill.runs.run_store import RunPaths, StagePaths
from distill.spec import registry
from distill.spec.model import DigitsData, OptimizerSpec, TrainStage, UNetSpec
from distill.students.init import StudentInit
from distill.training import engine
from tests.benchmarks.bns import bench_bns
from tests.benchmarks.caches import bench_caches
from tests.benchmarks.draws import bench_draws
from tests.benchmarks.evaluation import bench_evaluation
from tests.benchmarks.flowturbo import bench_flowturbo
from tests.benchmarks.guidance import bench_guidance
from tests.benchmarks.images import bench_images
from tests.benchmarks.loading import bench_loading, bench_waiting
from tests.benchmarks.pairs import bench_million, bench_pairs, bench_reading, bench_shards, bench_workers
from tests.benchmarks.plans import bench_plans
from tests.benchmarks.ranks import bench_checkpoint, bench_zero
from tests.benchmarks.recipes import bench_recipes
from tests.benchmarks.schedules import bench_schedules
from tests.benchmarks.solvers import bench_solvers
from tests.benchmarks.store import bench_looks, bench_runs
from tests.benchmarks.students import bench_index, bench_pull
from tests.benchmarks.threads import bench_threads
from tests.benchmarks.waves import bench_waves

CPU = torch.device("cpu")
SHAPE, CLASSES, BATCH = (1, 8, 8), 10, 128


def student() -> VelocityStudent:
    return StudentInit(None, UNetSpec(kind="unet", channels=[32, 48]), SHAPE, CLASSES, 0).velocity_field()


class Clocked:
    """A source that notes when it is asked."""

    def __init__(self, source: DataSource) -> None:
        self.source, self.times = source, []

    def batch(self, step: int, rows: Rows) -> Batch:
        self.times.append(time.perf_counter())
        return self.source.batch(step, rows)


def durations(times: list[float]) -> list[float]:
    return [b - a for a, b in zip(times, times[1:], strict=False)][3:]  # the first steps warm up


def bare_loop(network: nn.Module, source: Clocked, steps: int) -> None:
    """What one would write by hand for flow matching, with the same batches, clipping and optimizer."""
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, (0.9, 0.99), weight_decay=0, fused=True)
    network.train()
    for step in range(steps):
        batch = source.batch(step, Rows(0, BATCH, BATCH))
        noise, t = torch.randn_like(batch.data), torch.rand(BATCH)
        labels = torch.where(torch.rand(BATCH) < 0.1, CLASSES, batch.cond["class_labels"])
        at = t.view(-1, 1, 1, 1)
        x_t = (1 - at) * batch.data + at * noise
        v = network(x_t, 1000 * t, class_labels=labels).sample
        loss = (v - (noise - batch.data)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def bench_step(steps: int = 40) -> str:
    """The trainer's step against a bare PyTorch loop with the same network."""
    data = load_data(DigitsData(kind="digits"), 0)
    module = registry.load("pretrain/flow_matching", Path())
    ours, theirs = [], []
    for round_ in range(3):
        clock = Clocked(DataSource(data, BATCH, 0))
        bare_loop(student().network, clock, steps)
        theirs += durations(clock.times)
        with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
            clock = Clocked(DataSource(data, BATCH, 0))
            stage = TrainStage(
                kind="train", recipe="pretrain/flow_matching", images=steps * BATCH, optimizer=OptimizerSpec()
            )
            init = StudentInit(None, UNetSpec(kind="unet", channels=[32, 48]), SHAPE, CLASSES, round_)
            with Progress("bench", stage.images, "images", None) as progress:
                engine.train(
                    module.Recipe(module.Config(), None), init, clock, stage, seed=0, device=CPU, micro_batch=BATCH,
                    paths=StagePaths(Path(folder)), progress=progress, stop=stop,
                )  # fmt: skip
            ours += durations(clock.times)
    a, b = statistics.median(ours), statistics.median(theirs)
    return f"step    trainer {1000 * a:.0f} ms, bare loop {1000 * b:.0f} ms: ratio {a / b:.3f} (goal <= 1.05)"


def bench_start() -> str:
    """Start of commands that need no torch, against `python -c pass`."""
    with tempfile.TemporaryDirectory() as folder:

        def seconds(*command: str) -> float:
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=folder, check=False, capture_output=True)
            return time.perf_counter() - began

        commands = {"pass": ["-c", "pass"], "--help": ["-m", "distill", "--help"], "list": ["-m", "distill", "list"]}
        taken = {name: [] for name in commands}
        for _ in range(7):
            for name, command in commands.items():
                taken[name].append(seconds(*command))
    best = {name: min(times) for name, times in taken.items()}
    rows = [f"distill {n} {best[n]:.2f} s ({best[n] / best['pass']:.0f}x)" for n in ("--help", "list")]
    return f"start   {', '.join(rows)}; python -c pass {best['pass']:.3f} s (goal <= 0.5 s)"


def bench_digits(seeds: int = 3) -> str:
    """The bar of the digits preset, 10,000 samples, mean of the seeds."""
    values: dict[str, list[float]] = {}
    needed = ["teacher_steps=[1, 4, 16]", "students={one_step: [1], reflow: [1]}", "samples=10000"]
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            command = ["-m", "distill", "run", "digits", f"seed={seed}", "--name", f"digits-{seed}", "--store", "runs"]
            command += [f"stages.evaluate.{change}" for change in needed]
            subprocess.run([sys.executable, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            results = load_results(RunPaths(Path(folder) / "runs" / f"digits-{seed}").stage("evaluate"))
            for row in results.rows:
                values.setdefault(f"{row.label}, {row.steps}", []).append(row.distance)
    lines = [f"    {label:30s} {statistics.mean(v):7.2f}   {[round(x, 2) for x in v]}" for label, v in values.items()]
    return f"digits  FD-digits, 10,000 samples, mean of {seeds} seeds\n" + "\n".join(lines)


def bench_quickstart() -> str:
    """Wall time of the quickstart, installation aside."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "distill", "quickstart"], cwd=folder, check=True)
        return f"quickstart  {time.perf_counter() - began:.0f} s (goal <= 300 s)"


BENCHES: dict[str, Callable[[], str]] = {
    "step": bench_step,
    "pairs": bench_pairs,
    "start": bench_start,
    "draws": bench_draws,
    "workers": bench_workers,
    "million": bench_million,
    "reading": bench_reading,
    "shards": bench_shards,
    "caches": bench_caches,
    "recipes": bench_recipes,
    "threads": bench_threads,
    "waves": bench_waves,
    "solvers": bench_solvers,
    "bns": bench_bns,
    "schedules": bench_schedules,
    "flowturbo": bench_flowturbo,
    "guidance": bench_guidance,
    "quickstart": bench_quickstart,
    "digits": bench_digits,
    "zero": bench_zero,
    "checkpoint": bench_checkpoint,
    "pull": bench_pull,
    "index": bench_index,
    "plans": bench_plans,
    "evaluation": bench_evaluation,
    "images": bench_images,
    "loading": bench_loading,
    "waiting": bench_waiting,
    "runs": bench_runs,
    "looks": bench_looks,
}

if __name__ == "__main__":
    chosen = sys.argv[1:] or ["step", "pairs", "start", "draws"]
    unknown = [name for name in chosen if name not in BENCHES]
    if unknown:
        sys.exit(f"unknown {unknown}; valid: {list(BENCHES)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in chosen:
        print(BENCHES[name](), flush=True)
