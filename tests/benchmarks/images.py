"""What it costs to know a folder of images before a run, against decoding them all."""

import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from distill import data
from distill.data.decoding import decode
from distill.spec.model import ImagesData

COUNT, SIDE = 2000, 256


def bench_images() -> str:
    """CPU seconds to index a folder of JPEGs, to look whether it has changed, and to decode it once."""
    with tempfile.TemporaryDirectory() as folder:
        root, store = Path(folder) / "images", Path(folder) / "runs"
        root.mkdir()
        generator = np.random.default_rng(0)
        for i in range(COUNT):
            coarse = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(root / f"{i:05}.jpg", quality=90)
        time.sleep(3)  # files changed less than two seconds before they are indexed are read again
        spec = ImagesData(kind="images", path=str(root), size=SIDE)
        taken = []
        for work in (
            lambda: data.update_index(spec, store),
            lambda: data.update_index(spec, store),
            lambda: data.load_data(spec, 0, store, indexed=True),
            lambda: [decode(path.read_bytes(), "", (SIDE, SIDE), 3) for path in root.iterdir()],
        ):
            began = time.process_time()
            work()
            taken.append(time.process_time() - began)
        index, look, rank, full = taken
        size = sum(path.stat().st_size for path in (store / "indexes").iterdir())
    return (
        f"images  {COUNT:,} JPEGs of {SIDE}x{SIDE}: index {index:.2f} s, decode {full:.2f} s: ratio {index / full:.3f} "
        f"(goal <= 0.15); again {look:.3f} s, a rank {rank:.3f} s; {size / COUNT:.0f} bytes an image"
    )
