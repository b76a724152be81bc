"""Evaluations: memory by the number of samples, and speed by the number of processes."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from distill.core.errors import RunError
from distill.core.stop import StopRequest
from distill.data import load_data
from distill.evaluation import measuring
from distill.evaluation.metrics import features
from distill.runs.progress import Progress
from distill.runs.run_store import RunPaths, read_events
from distill.spec.model import DigitsData, EvaluateStage
from distill.testing.subject import unet_teacher

FEW, MANY = 10_000, 100_000
METRICS = ["programs.image_metrics:brightness", "programs.image_metrics:halves"]


def peak(samples: int) -> float:
    """Peak memory in MB of this process, which measures two rows of this many samples."""
    features.TRAIN_IMAGES = 512
    stage = EvaluateStage(
        kind="evaluate", students={}, teacher_steps=[1], fine_solver="ab2", fine_steps=2, samples=samples, block=500,
        baselines=[], metrics=METRICS,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, Progress("rows", 2 * samples, "samples", None) as progress:
        measuring.measure(
            Path(folder), "rows", stage, unet_teacher(), {}, load_data(DigitsData(kind="digits"), 0),
            seed=0, device=torch.device("cpu"), progress=progress, stop=StopRequest(), store=Path(folder),
        )  # fmt: skip
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def speed(procs: int) -> float:
    """Samples per second of an evaluation by this many processes of one thread."""
    train = {
        "kind": "train", "recipe": "pretrain/flow_matching", "images": 64, "batch_size": 32,
        "network": {"kind": "unet", "channels": [64, 96]}, "optimizer": {"lr": 1e-4},
    }  # fmt: skip
    measure = {
        "kind": "evaluate", "teacher": "teach", "students": {}, "teacher_steps": [4, 8], "fine_steps": 16,
        "samples": 1024, "block": 64, "baselines": [],
    }  # fmt: skip
    spec = {
        "name": "timed", "data": {"kind": "digits"}, "stages": {"teach": train, "measure": measure},
        "launch": {"procs": procs, "threads": 1, "device": "cpu"},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.yaml"
        path.write_text(json.dumps(spec))
        command = [sys.executable, "-m", "distill", "run", str(path), "--store", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(done.stderr)
        events = read_events(RunPaths(Path(folder) / "timed"))
        seen = [(e["done"], e["time"]) for e in events if e.get("event") == "progress" and e.get("label") == "measure"]
        (first, began), (last, ended) = seen[0], seen[-1]
        return float((last - first) / (ended - began))


def bench_evaluation() -> str:
    """Peak memory for ten times the samples, and the speed of two processes against one."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    found = {}
    for count in (FEW, MANY):
        command = [sys.executable, "-m", "tests.benchmarks.evaluation", str(count)]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        found[count] = float(done.stdout)
    one, two = speed(1), speed(2)
    return (
        f"evaluation: peak memory {found[MANY]:.0f} MB for {MANY:,} samples / {found[FEW]:.0f} MB for {FEW:,}; two "
        f"processes {two:.1f} samples/s / one {one:.1f}: {two / one:.2f}"
    )


if __name__ == "__main__":
    print(peak(int(sys.argv[1])))
