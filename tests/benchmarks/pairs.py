"""Pairs: generation against a bare sampler loop, two workers against one, memory and reading of a million, and what
making, opening and reading a set costs by the number of its shards.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from distill import pairs
from distill.core.stop import StopRequest
from distill.flow.draws import Rows
from distill.pairs import PairSet, PairSource
from distill.runs.progress import Progress
from distill.spec.model import MixtureTeacher, PairsStage, UNetSpec
from distill.students.init import StudentInit
from distill.teachers.analytic import mixture_teacher
from distill.teachers.loaded import LoadedTeacher

CPU = torch.device("cpu")
SHARDS = (100, 200, 1000, 2000, 10_000)
SHAPE, CLASSES, BLOCK, STEPS = (1, 8, 8), 10, 256, 6
MIXTURE = mixture_teacher(MixtureTeacher(kind="mixture", means=[[-2.0, 0.0], [2.0, 0.0]], std=0.3))


def _teacher() -> LoadedTeacher:
    init = StudentInit(None, UNetSpec(kind="unet", channels=[32, 48]), SHAPE, CLASSES, 0)
    field = init.velocity_field().eval()
    return LoadedTeacher(field, SHAPE, CLASSES, CLASSES, "0" * 64, "random U-Net", field.network, None)


def _generate(teacher: LoadedTeacher, stage: PairsStage, folder: Path) -> float:
    """Seconds."""
    with StopRequest() as stop, Progress("bench", stage.count, "pairs", None) as progress:
        began = time.perf_counter()
        pairs.generate(teacher, stage, folder, seed=0, device=CPU, progress=progress, stop=stop)
        return time.perf_counter() - began


@torch.no_grad()
def _bare_heun(network: nn.Module, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    def velocity(x: Tensor, t: float) -> Tensor:
        return network(x, torch.full((len(x),), 1000 * t), class_labels=labels).sample

    x = noise
    for i in range(steps):
        t, t_next = 1 - i / steps, 1 - (i + 1) / steps
        v = velocity(x, t)
        x_next = x + (t_next - t) * v
        x = x_next if t_next == 0 else x + (t_next - t) * (v + velocity(x_next, t_next)) / 2
    return x


def bench_pairs(count: int = 1024) -> str:
    """Pairs on disk against the bare sampler loop."""
    teacher = _teacher()
    stage = PairsStage(kind="pairs", count=count, steps=STEPS, block=BLOCK, shard=2 * BLOCK)
    ratios = []
    for _ in range(7):
        began = time.perf_counter()
        for first in range(0, count, BLOCK):
            labels = torch.arange(first, first + BLOCK) % CLASSES
            _bare_heun(teacher.network, torch.randn(BLOCK, *SHAPE), labels, STEPS)
        bare = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            ratios.append(bare / _generate(teacher, stage, Path(folder)))
    return f"pairs   of a bare sampler loop's rate: {statistics.median(ratios):.3f} (goal >= 0.97)"


def bench_workers(count: int = 2048) -> str:
    """Two workers of one thread against one, by turns."""
    command = [sys.executable, "-m", "tests.benchmarks.pairs", "worker", str(count)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]

    def work(chosen: list[subprocess.Popen]) -> float:
        began = time.perf_counter()
        for each in chosen:
            each.stdin.write("go\n")
            each.stdin.flush()
        for each in chosen:
            each.stdout.readline()
        return len(chosen) * count / (time.perf_counter() - began)

    work(workers)  # warm
    ratios = [work(workers) / work(workers[i % 2 :][:1]) for i in range(6)]
    for each in workers:
        each.stdin.close()
        each.wait()
    return f"workers two of one thread, of one's rate: {statistics.median(ratios):.2f} (goal >= 1.7)"


def bench_million(few: int = 100_000, many: int = 1_000_000) -> str:
    """Peak memory of making and reading small pairs, by their number; and how fast they are read."""
    found = {}
    for count in (few, many):
        command = [sys.executable, "-m", "tests.benchmarks.pairs", "peak", str(count)]
        found[count] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    lines = [
        f"{count:,} pairs: made in {each['made']:.0f} s, peak {each['generate']:.0f} MB; "
        f"an epoch read at {each['rate']:,.0f} pairs/s, peak {each['read']:.0f} MB"
        for count, each in found.items()
    ]
    return "million " + "\n        ".join([*lines, "(goal: the same peaks)"])


def bench_reading(count: int = 16384, batch: int = 128) -> str:
    """Pairs of 8x8 images read, against what four trainers of a small U-Net eat."""
    teacher = _teacher()
    with tempfile.TemporaryDirectory() as folder:
        _generate(teacher, PairsStage(kind="pairs", count=count, solver="euler", steps=1), Path(folder))
        source = PairSource(PairSet.open(Path(folder), None), batch, 0)
        steps = 2 * count // batch
        began = time.perf_counter()
        for step in range(steps):
            source.batch(step, Rows(0, batch, batch))
        read = steps * batch / (time.perf_counter() - began)
    network = StudentInit(None, UNetSpec(kind="unet", channels=[32, 48]), SHAPE, CLASSES, 0).velocity_field()
    data = torch.randn(batch, *SHAPE)
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        network(
            data, torch.full((batch,), 0.5), {"class_labels": torch.zeros(batch, dtype=torch.int64)}
        ).sum().backward()
        seconds.append(time.perf_counter() - began)
    eaten = 4 * batch / statistics.median(seconds[2:])
    return f"reading {read:,.0f} pairs/s; four trainers eat {eaten:,.0f}: ratio {read / eaten:.1f} (goal > 1)"


def bench_shards() -> str:
    """CPU seconds by the number of shards of 16 pairs: of making a set, of opening one, of batches of it.

    In memory, where there is a disk in it: a disk's own time is none of the CPU's, and long.
    """
    made, opened, batch, few = {}, {}, {}, {}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        _make_shards(Path(folder) / "warm", 10)
        for shards in SHARDS:
            begun, at = time.process_time(), Path(folder) / str(shards)
            _make_shards(at, shards)
            made[shards], begun = time.process_time() - begun, time.process_time()
            found = PairSet.open(at, None)
            opened[shards] = time.process_time() - begun
            batch[shards] = _batch_seconds(found, Rows(0, 1024, 1024))
            few[shards] = _batch_seconds(found, Rows(512, 528, 1024))
    lines = [
        f"{shards:,} shards: made in {made[shards]:.2f} s, opened in {opened[shards]:.3f} s, a batch of 1,024 in "
        f"{1000 * batch[shards]:.1f} ms, 16 rows of it in {1000 * few[shards]:.1f} ms"
        for shards in made
    ]
    return "shards  " + "\n        ".join(
        [
            *lines,
            f"making grows as the number to the power of {_power(made, 100, 1000):.2f} (goal about 1)",
            f"opening grows as the number to the power of {_power(opened, 200, 2000):.2f} (goal about 1)",
            f"10,000 shards are opened in {opened[10_000]:.2f} s (goal <= 1)",
            f"a batch at 1,000 shards / at 100: {batch[1000] / batch[100]:.2f} (goal about 1)",
        ]
    )


def _power(seconds: Mapping[int, float], few: int, many: int) -> float:
    """The power of the number of shards that these seconds grow with."""
    return math.log(seconds[many] / seconds[few]) / math.log(many / few)


def _make_shards(folder: Path, shards: int) -> None:
    stage = PairsStage(kind="pairs", count=16 * shards, solver="euler", steps=1, block=16, shard=16)
    _generate(MIXTURE, stage, folder)


def _batch_seconds(found: PairSet, rows: Rows, steps: int = 20) -> float:
    """Median CPU seconds of a batch of these rows."""
    source, seconds = PairSource(found, rows.total, 0), []
    for step in range(steps):
        begun = time.process_time()
        source.batch(step, rows)
        seconds.append(time.process_time() - begun)
    return statistics.median(seconds)


def _worker(count: int) -> None:
    torch.set_num_threads(1)
    teacher = _teacher()
    stage = PairsStage(kind="pairs", count=count, steps=STEPS, block=BLOCK, shard=2 * BLOCK)
    for _ in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            _generate(teacher, stage, Path(folder))
        print("done", flush=True)


def _peak(count: int) -> None:
    import resource

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stage = PairsStage(kind="pairs", count=count, solver="heun", steps=4, block=1024, shard=8192)
        made = _generate(MIXTURE, stage, Path(folder))
        generate = peak()
        source = PairSource(PairSet.open(Path(folder), None), 1024, 0)
        began = time.perf_counter()
        for step in range(count // 1024):
            source.batch(step, Rows(0, 1024, 1024))
        rate = count / (time.perf_counter() - began)
    print(json.dumps({"made": made, "generate": generate, "rate": rate, "read": peak()}))


if __name__ == "__main__":
    {"worker": _worker, "peak": _peak}[sys.argv[1]](int(sys.argv[2]))
