"""How long it takes to read data, and so how many worker processes the training needs."""

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distill.core.errors import InputError
from distill.data import load_data, update_index
from distill.data.cropping import scaled
from distill.data.decoding import decode
from distill.data.source import DataSet, DataSource
from distill.flow.draws import Rows, sample_noise
from distill.spec.model import DataSpec

SIDE = 512  # pixels of the example image
BATCH = 8  # samples that are read at once
SECONDS, SAMPLES = 3.0, 512  # reading ends after this time or number of samples
SMALL = 0.03  # share of the training time that reading may take without workers


@dataclass(frozen=True)
class ReadingTime:
    """The time that one process with one thread needs to read and decode a sample."""

    what: str
    seconds: float

    def workers(self, rate: float | int) -> int:
        """The worker processes that are needed to read `rate` samples per second; 0 if reading takes hardly any time.

        That is rate * seconds, rounded up.
        """
        return 0 if rate * self.seconds <= SMALL else math.ceil(rate * self.seconds)


def of_example() -> ReadingTime:
    """Measures the decoding of a generated JPEG of 512 x 512 pixels."""
    encoded = example(SIDE)

    def read(step: int) -> torch.Tensor:
        return scaled(torch.from_numpy(decode(encoded, "", (SIDE, SIDE), 3)))

    return ReadingTime(f"a {SIDE}x{SIDE} JPEG", _measured(read, 1, seconds=0.3))


def of_data(spec: DataSpec, seed: int, store: Path) -> ReadingTime:
    """Measures a data set in the order in which training reads it. Raises InputError if the spec has none.

    store: the folder of runs, where an index of the data is kept, as for a run.
    """
    update_index(spec, store)
    data = load_data(spec, seed, store, keep=False)
    if data is None:
        given, needed = ("only prompts", "images or other samples") if spec.kind == "prompts" else ("no data", "data")
        raise InputError(f"--data: the spec has {given} (data.kind: {spec.kind}); give a spec with {needed}")
    return of_set(data, seed, f"a sample of '{data.name}'")


def of_set(data: DataSet, seed: int, what: str) -> ReadingTime:
    """Measures a data set that is open. what: a sample of it, in words."""
    source = DataSource(data, BATCH, seed)
    return ReadingTime(what, _measured(lambda step: source.batch(step, Rows(0, BATCH, BATCH)), BATCH))


def _measured(read: Callable[[int], object], count: int, seconds: float = SECONDS) -> float:
    """The seconds for each of `count` samples that `read(step)` reads, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        read(0)
        began, step = time.perf_counter(), 0
        while step == 0 or (time.perf_counter() - began < seconds and step * count < SAMPLES):
            step += 1
            read(step)
        return (time.perf_counter() - began) / (step * count)
    finally:
        torch.set_num_threads(threads)


def example(side: int, number: int = 0) -> bytes:
    """A JPEG with smooth shapes and some noise, about as large and as slow to decode as a photo.

    number: which one.
    """
    coarse = (side // 16, side // 16, 3)
    shapes = (128 + 60 * sample_noise(number, [0], coarse)[0]).clamp(0, 255).to(torch.uint8).numpy()
    smooth = Image.fromarray(shapes).resize((side, side), Image.Resampling.BICUBIC)
    noise = 6 * sample_noise(number, [1], (side, side, 3))[0].numpy()
    pixels = (np.asarray(smooth, dtype=np.float32) + noise).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()
