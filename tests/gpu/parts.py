"""The checks of the GPU smoke test: python -m tests.gpu.parts NAME FOLDER [--device cuda|cpu] [--small].

Each part adds rows (what, value, ok) to FOLDER/rows.json as soon as they are known. `ok` is None if nothing is
expected. A part that cannot run here exits with 3 and says why.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

SKIPPED = 3
COMPILED = ["reflow/reflow", "shortcut/meanflow", "score/dmd2"]  # recipes that are also compiled
BOUNDS = {"fp32": 1e-3, "bf16": 5e-2}  # of losses, relative to those of the CPU in fp32
CLI = [sys.executable, "-m", "distill"]


@dataclass
class Part:
    """What a part is given, and its rows."""

    out: Path
    device: torch.device
    small: bool
    rows: list[dict[str, object]] = field(default_factory=list)

    def add(self, what: str, value: object, ok: bool | None = None) -> None:
        self.rows.append({"what": what, "value": f"{value:.4g}" if isinstance(value, float) else str(value), "ok": ok})
        (self.out / "rows.json").write_text(json.dumps(self.rows))

    def distill(self, *arguments: str) -> None:
        """Run a command of distill in the part's folder."""
        print("distill", *arguments, flush=True)
        subprocess.run([*CLI, *arguments], cwd=self.out, check=True)

    @property
    def launch(self) -> str:
        return f"launch.device={self.device.type}"


def skip(why: str) -> None:
    print(why)
    sys.exit(SKIPPED)


# --- through the command line ---

SHORT = [
    "stages.teach.images=1280", "stages.teach.ema_half_lives=[256]", "stages.teach.export=256",
    "stages.teach.optimizer.warmup_images=128", "stages.pairs.count=500", "stages.pairs.shard=250",
    "stages.reflow.images=640", "stages.reflow.ema_half_lives=[256]", "stages.reflow.export=256",
    "stages.reflow.optimizer.warmup_images=128", "stages.one_step.images=640",
    "stages.one_step.ema_half_lives=[256]", "stages.one_step.export=256",
    "stages.one_step.optimizer.warmup_images=128", "stages.evaluate.samples=250",
]  # fmt: skip


def quickstart(part: Part) -> None:
    """The quickstart: after full training, the one-step student is better than its teacher in eight steps."""
    from distill.runs.results import load_results
    from distill.runs.run_store import RunPaths

    began = time.monotonic()
    part.distill("run", "digits", "--name", "digits", part.launch, *(SHORT if part.small else []))
    part.add("seconds of the quickstart", time.monotonic() - began)
    found = load_results(RunPaths(part.out / "runs" / "digits").stage("evaluate"))
    assert found is not None
    distances = {(row.network, row.steps): row.distance for row in found.rows}
    for key in (("teacher", 8), ("one_step", 1)):
        part.add(f"FD-digits of {key[0]} at {key[1]}", distances[key])
    better = distances["one_step", 1] < distances["teacher", 8]
    part.add("one_step in 1 step is better than the teacher in 8", better, None if part.small else better)


SMALL_RUN = """
name: NAME
data: {kind: digits}
stages:
  teach:
    kind: train
    recipe: pretrain/flow_matching
    network: {kind: unet, channels: [32, 48], dropout: 0.1}
    images: IMAGES
    batch_size: 128
    optimizer: {lr: 1.0e-3}
    ema_half_lives: [2000]
    checkpoint: {images: 1280, minutes: null}
"""


def resume(part: Part) -> None:
    """kill -9 and resume, in exact mode: the student is the same to the bit, also in two runs without a kill."""
    images = 3840 if part.small else 25600
    digests = {}
    for name in ("whole", "again", "killed"):
        (part.out / f"{name}.yaml").write_text(SMALL_RUN.replace("NAME", name).replace("IMAGES", str(images)))
        if name == "killed":
            command = [*CLI, "run", "killed.yaml", part.launch]
            process = subprocess.Popen(command, cwd=part.out, start_new_session=True)
            checkpoints = part.out / "runs" / "killed" / "stages" / "teach" / "checkpoints"
            while process.poll() is None and not any(checkpoints.glob("step-*")):
                time.sleep(0.02)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                time.sleep(1)
            part.add("killed before its end", process.returncode == -signal.SIGKILL, process.returncode != 0)
            part.distill("run", "killed", "--resume")
        else:
            part.distill("run", f"{name}.yaml", part.launch)
        student = part.out / "runs" / name / "students" / "teach" / "unet" / "diffusion_pytorch_model.safetensors"
        digests[name] = hashlib.sha256(student.read_bytes()).hexdigest()[:12]
    part.add(
        "two runs give the same bits", f"{digests['whole']} {digests['again']}", digests["whole"] == digests["again"]
    )
    part.add("so does a killed and resumed run", digests["killed"], digests["killed"] == digests["whole"])


def export(part: Part) -> None:
    """A student of the quickstart, loaded by plain diffusers on the GPU, gives the samples of `distill sample`."""
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    run = part.out.parent / "quickstart" / "runs" / "digits"
    if not (run / "students" / "one_step" / "distill.json").is_file():
        skip("the part 'quickstart' has made no student")
    part.distill(
        "sample", str(run / "students" / "one_step"), "--steps", "1", "--count", "16", "--out", "ours.safetensors"
    )
    ours = load_file(part.out / "ours.safetensors")
    pipeline = DiffusionPipeline.from_pretrained(run / "students" / "one_step", trust_remote_code=True).to(part.device)
    given = {name: ours[name].to(part.device) for name in ("latents", "class_labels")}
    images = pipeline(1, **given, output_type="pt").images.cpu()
    error = float((images - ours["samples"]).abs().max())
    part.add("largest difference of samples", error, error < 1e-3)


# --- in this process ---


def zero(part: Part) -> None:
    """ZeRO 0 to 3 on one GPU, over NCCL: the losses are those without DeepSpeed, in fp32 and bf16."""
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        skip("deepspeed is not installed")
    from distill import testing
    from distill.training.plain import PLAIN
    from distill.training.zero import Zero
    from tests.gpu.training import losses, one_rank

    world = one_rank(part.device)
    subject = testing.Subject("pretrain/flow_matching")
    for precision, bound in (("fp32", 1e-4), ("bf16", 5e-2)):
        plain = losses(subject, part, precision=precision, world=world, sharding=PLAIN)
        for stage in range(4):
            found = losses(
                subject, part, precision=precision, world=world, sharding=Zero(stage, persistence_threshold=0)
            )
            worst = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(found, plain, strict=True))
            part.add(f"ZeRO {stage}, {precision}: relative difference of losses", worst, worst < bound)


def recipes(part: Part) -> None:
    """Five steps of each recipe in fp32 and bf16, against the CPU's losses in fp32; three of them also compiled."""
    from test_conformance import ALL

    from distill import testing
    from distill.training.blocks import Blocks
    from tests.gpu.training import losses

    names = COMPILED if part.small else list(ALL)
    cases = [(precision, bound, ALL[name], Blocks()) for precision, bound in BOUNDS.items() for name in names]
    for name in COMPILED:
        options = {"derivative": "central"} if name == "shortcut/meanflow" else {}  # not with forward-mode derivatives
        cases.append(("fp32", BOUNDS["fp32"], testing.Subject(name, options=options), Blocks(compiled=True)))
    expected: dict[testing.Subject, list[float]] = {}
    for precision, bound, subject, blocks in cases[:-2] if part.small else cases:
        if subject not in expected:
            expected[subject] = losses(subject, part, device=torch.device("cpu"))
        found = losses(subject, part, precision=precision, blocks=blocks)
        pairs = zip(found, expected[subject], strict=True)
        worst = max(abs(a - b) / max(abs(b), 1e-2) for a, b in pairs)
        how = f"{precision}, compiled" if blocks.compiled else precision
        part.add(f"{subject.recipe}, {how}: relative difference of losses", worst, worst < bound)


def speed(part: Part) -> None:
    """A U-Net of 100 M and a DiT of 300 M weights: step time against a bare loop, images/s, memory, and shares."""
    from tests.gpu.speed import measure

    for name in ("unet", "dit"):
        measure(part, name)


PARTS = {each.__name__: each for each in (quickstart, resume, zero, speed, recipes, export)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        skip("torch sees no GPU")
    from distill.execution import devices
    from distill.spec.model import LaunchSpec

    sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests import each other by their names
    PARTS[given.name](Part(given.out, devices.place(LaunchSpec(device=given.device)), given.small))


if __name__ == "__main__":
    main()
