"""Caches: what opening and reading one costs by the number of its shards and of its images."""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from distill.caches import LatentManifest, open_latents
from distill.caches.latents import generate
from distill.core.stop import StopRequest
from distill.data import DataSource
from distill.data.arrays import ArrayData
from distill.flow.codecs import PIXELS
from distill.flow.draws import Rows
from distill.runs.progress import Progress
from distill.spec.cachespec import CacheStage

SETS = {"1,000 shards, 10,000 images": (1000, 10), "10,000 shards, 10,000 images": (10_000, 1),
        "10,000 shards, 1,000,000 images": (10_000, 100)}  # fmt: skip
BATCH, STEPS = 256, 100


def _make(folder: Path, shards: int, images: int) -> None:
    """A cache of so many shards of so many images each: all are links to the first."""
    data = ArrayData("x", torch.zeros(images, 1, 4, 4), torch.zeros(images, dtype=torch.int64), 10)
    stage = CacheStage(kind="cache", block=images, shard=images, prompts_shard=images)
    with StopRequest() as stop, Progress("bench", images, "images", None) as progress:
        generate(data, PIXELS, stage, folder, seed=0, device=torch.device("cpu"), progress=progress, stop=stop)
    manifest = LatentManifest.model_validate_json((folder / "manifest.json").read_bytes())
    (entry,) = manifest.shards.values()
    layout = manifest.model_copy(update={"count": images * shards}).model_dump()
    whole = LatentManifest(**{**layout, "shards": {}})
    listed = {}
    for number in range(shards):
        name, at = whole.layout.name(number), whole.layout.indices(number)
        listed[name] = entry.model_copy(update={"start": at.start, "stop": at.stop})
        if number:
            (folder / name).hardlink_to(folder / whole.layout.name(0))
    whole.with_shards(listed, done=True).save(folder)


def _cost(folder: Path) -> dict[str, float]:
    """Opening a cache and reading batches from it, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.caches", str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def bench_caches() -> str:
    """CPU seconds, seconds and memory by the number of shards and images."""
    lines = []
    for name, (shards, images) in SETS.items():
        with tempfile.TemporaryDirectory() as root:
            _make(Path(root) / "cache", shards, images)
            found = _cost(Path(root) / "cache")
            shutil.rmtree(Path(root) / "cache")
        lines.append(
            f"    {name}: opened in {found['seconds']:.2f} s (goal <= 1), {found['cpu']:.2f} s of CPU; a batch of "
            f"{BATCH} in {1000 * found['batch']:.1f} ms; memory grows by {found['megabytes']:.0f} MB"
        )
    return "caches\n" + "\n".join(lines)


def _memory() -> float:
    """Megabytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _main(folder: Path) -> None:
    torch.set_num_threads(1)
    before, begun, cpu = _memory(), time.perf_counter(), time.process_time()
    found = open_latents(folder, 0)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    source, begun = DataSource(found, BATCH, 0), time.process_time()
    for step in range(STEPS):
        source.batch(step, Rows(0, BATCH, BATCH))
    batch = (time.process_time() - begun) / STEPS
    print(json.dumps({"cpu": cpu, "seconds": seconds, "batch": batch, "megabytes": _memory() - before}))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
