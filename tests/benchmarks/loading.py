"""Worker processes that read data: how much faster they are, and how long training waits."""

import statistics
import tempfile
import time
from pathlib import Path

from safetensors.torch import save_file

from distill import data
from distill.data import DataSource, images
from distill.data.timing import SIDE, example
from distill.flow.draws import Rows, sample_noise
from distill.spec.model import ImagesData, LatentsData
from distill.training import loading

BATCH, STEPS, ROUNDS = 16, 40, 5
STEP = 0.1  # seconds of a training step


def rate(source: DataSource, workers: int) -> float:
    """Samples per second that workers prepare, while nothing else is done; without those of their start."""
    whole, first = Rows(0, BATCH, BATCH), loading.AHEAD * workers + 1
    with loading.opened(source, workers, whole, data=source.data) as loader:
        for step in range(STEPS):
            loader.batch(step, whole)
            if step == first:
                began = time.perf_counter()
        return (STEPS - 1 - first) * BATCH / (time.perf_counter() - began)


def bench_loading() -> str:
    """JPEGs of 512x512, each decoded once, with one worker and with two."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(STEPS * BATCH):
            Path(folder, f"{i:04}.jpg").write_bytes(example(SIDE, i))
        images.KEEP_BYTES = 0  # otherwise a second round would decode nothing
        loaded = data.load_data(ImagesData(kind="images", path=folder, size=SIDE, crop="random", flip=True), 0)
        source = DataSource(loaded, BATCH, 0)
        found = {0: [], 1: [], 2: []}
        for _ in range(ROUNDS):
            for workers, rates in found.items():
                rates.append(rate(source, workers))
    none, one, two = (statistics.median(rates) for rates in found.values())
    ratios = [b / a for a, b in zip(found[1], found[2], strict=True)]
    return (
        f"loading JPEGs of {SIDE}x{SIDE}, a second: two workers {two:.0f}, one {one:.0f}, none {none:.0f}: ratio of "
        f"two and one {two / one:.2f} (goal >= 1.8; {min(ratios):.2f} to {max(ratios):.2f} in {ROUNDS} rounds)"
    )


def waiting(source: DataSource, batch: int, workers: int, steps: int = 30) -> float:
    """The share of the time for which a loop waits for batches. Its steps take STEP and use no CPU, as on a GPU."""
    whole = Rows(0, batch, batch)
    with loading.opened(source, workers, whole, data=source.data) as loader:
        timed = loading.TimedSource(loader)
        for step in range(steps):
            timed.batch(step, whole)
            if step == 2:  # the workers have started
                timed.take()
                began = time.perf_counter()
            time.sleep(STEP)
        return timed.take() / (time.perf_counter() - began)


def bench_waiting() -> str:
    """Latents [4, 32, 32] in float16, and moments [8, 32, 32] that are sampled, from shards of 512."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, channels in (("latents", 4), ("moments", 8)):
            for shard in range(8):
                stored = sample_noise(shard, range(512), (channels, 32, 32)).half()
                Path(folder, name).mkdir(exist_ok=True)
                save_file({"latents": stored}, Path(folder, name, f"{shard}.safetensors"))
            spec = LatentsData(kind="latents", path=f"{folder}/{name}", scaled=True, moments=name == "moments")
            loaded = data.load_data(spec, 0)
            for batch in (64, 256):
                source = DataSource(loaded, batch, 0)
                found = {workers: waiting(source, batch, workers) for workers in (0, 1, 2)}
                shares = ", ".join(f"{workers} workers {100 * share:.1f} %" for workers, share in found.items())
                lines.append(f"    {name}, batch {batch}: {shares}")
    return f"waiting for data, share of the time, steps of {1000 * STEP:.0f} ms (goal <= 3 %)\n" + "\n".join(lines)
