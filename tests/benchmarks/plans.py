"""Step times that a plan predicts, against measured ones: networks of 0.3 and 20 million weights on this CPU."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from distill.core.errors import RunError
from distill.execution import preflight
from distill.execution.layouts import TrainingJob, layout_of, work_of
from distill.execution.run_costs import RunCounter
from distill.plans.costs import Assumptions, Machines, calibrated
from distill.plans.device_kinds import GIGA, TERA, DeviceKind
from distill.runs.run_store import RunPaths, read_events
from distill.spec import checks, specfile
from distill.spec.model import LaunchSpec

CHANNELS = {"0.3 M": [24, 40], "20 M": [192, 352]}
STEPS, UNTIMED = 16, 4
# One thread. Only the ratio of operations and bytes per second matters: the calibration finds the speed.
PEAK = dict.fromkeys(("bf16", "tf32", "fp32"), 0.1 * TERA)
CPU = DeviceKind("a core", 8 * GIGA, PEAK, 10 * GIGA, GIGA, GIGA, 10 * GIGA, "assumed")


def content(name: str, batch: int, procs: int) -> dict[str, Any]:
    """A spec that trains a U-Net on digits, with a number of samples for each process."""
    total = batch * procs
    train = {
        "kind": "train", "recipe": "pretrain/flow_matching", "images": STEPS * total, "batch_size": total,
        "network": {"kind": "unet", "channels": CHANNELS[name]}, "optimizer": {"lr": 1e-4}, "ema_half_lives": [1e5],
        "export": 1e5,
    }  # fmt: skip
    launch = {"procs": procs, "threads": 1, "device": "cpu"}
    return {"name": "timed", "data": {"kind": "digits"}, "stages": {"train": train}, "launch": launch}


def counted(name: str, batch: int, procs: int) -> TrainingJob:
    resolved = checks.check(specfile.validate(content(name, batch, procs), "spec"), Path())
    counter = RunCounter(lambda line: None)
    preflight.check(resolved, visit=counter)
    return counter.found.trainings["train"]


def measured(name: str, batch: int, procs: int) -> float:
    """Seconds of a step, in a run of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.yaml"
        path.write_text(json.dumps(content(name, batch, procs)))
        command = [sys.executable, "-m", "distill", "run", str(path), "--store", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(done.stderr)
        events = read_events(RunPaths(Path(folder) / "timed"))
        seen = [(each["done"], each["time"]) for each in events if each.get("event") == "progress"]
        timed = [each for each in seen if each[0] >= UNTIMED * batch * procs]
        (first, began), (last, ended) = timed[0], timed[-1]
        return float((ended - began) / (last - first) * batch * procs)


def bench_plans() -> str:
    """A step with one process calibrates the plan; it then predicts other batches and two processes."""
    found = []
    for name, batch in (("0.3 M", 256), ("20 M", 16)):
        job, machines = counted(name, batch, 1), Machines(CPU, 1, 1)
        taken = measured(name, batch, 1)
        assumed = calibrated(work_of(job, LaunchSpec()), machines, "fp32", taken, Assumptions())
        for size, procs in ((2 * batch, 1), (batch, 2)):
            other, launch = counted(name, size, procs), LaunchSpec(procs=procs)
            layout = layout_of({"train": other}, CPU, launch, assumed)
            ratio = layout.trainings["train"].step.total / measured(name, size, procs)
            found.append(f"{name}, {size} samples each, {procs} process{'es' if procs > 1 else ''}: {ratio:.2f}")
    return f"step times, predicted / measured, after one step that calibrates: {'; '.join(found)}"
