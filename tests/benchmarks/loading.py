"""Worker processes that read data: how much faster they are, and how long training waits."""

import statistics
import tempfile
import time
from pathlib import Path

from distill import data
from distill.data import DataSource, images
from distill.data.timing import SIDE, example
from distill.flow.draws import Rows
from distill.spec.model import ImagesData
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
