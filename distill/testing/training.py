"""Trains a recipe for a few steps on random images, with the training engine."""

import contextlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch

from distill.core.errors import Stopped
from distill.core.stop import StopRequest
from distill.runs.progress import Progress
from distill.runs.run_store import StagePaths
from distill.spec.model import CheckpointSpec, OptimizerSpec, TrainStage
from distill.testing.subject import Noise, Subject, start
from distill.training import engine
from distill.training.blocks import EAGER, Blocks
from distill.training.engine import TrainResult
from distill.training.plain import PLAIN
from distill.training.roles import Roles
from distill.training.sharding import Sharding
from distill.training.world import ALONE, World

CPU = torch.device("cpu")
BATCH, MOVES = 4, 2  # batch size, and number of updates of the student; other networks may have more or fewer


class Recorder(Progress):
    """Records the logged numbers of every step, and requests a stop after a given number of images."""

    def __init__(self, stop: StopRequest, stop_at: int | None) -> None:
        super().__init__("test", MOVES * BATCH, "images", None)
        self.steps: list[dict[str, float]] = []
        self.stop, self.stop_at = stop, stop_at

    def update(self, done: int, *logs: Mapping[str, float]) -> None:
        self.steps.extend(map(dict, logs))
        if done == self.stop_at:
            self.stop.signal, self.stop_at = "the test", None


def train(
    subject: Subject,
    folder: Path,
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    micro_batch: int | None = None,
    stop_at: int | None = None,
    world: World = ALONE,
    sharding: Sharding = PLAIN,
    device: torch.device = CPU,
    blocks: Blocks = EAGER,
    moves: int = MOVES,
    probe: Callable[[Roles], None] | None = None,
) -> tuple[TrainResult, list[dict[str, float]]]:
    """Train a recipe; returns the result and the logged numbers of every step.

    micro_batch: None: all rows of a rank. stop_at: stop after this many images, then resume. moves: number of updates
    of the student.
    """
    recipe, init, teacher = start(subject)
    stage = TrainStage(
        kind="train",
        recipe=subject.recipe,
        images=moves * BATCH,
        batch_size=BATCH,
        precision=precision,
        optimizer=OptimizerSpec(lr=1e-3),
        ema_half_lives=[16.0],
        checkpoint=CheckpointSpec(images=moves * BATCH),
    )
    stop = StopRequest()
    recorder = Recorder(stop, stop_at)

    def go() -> TrainResult:
        return engine.train(
            recipe if stop_at is None else start(subject)[0],
            init,
            Noise(BATCH, subject.times),
            stage,
            seed=0,
            device=device,
            micro_batch=micro_batch or BATCH // world.size,
            paths=StagePaths(folder),
            progress=recorder,
            stop=stop,
            world=world,
            sharding=sharding,
            teacher=teacher.network,
            blocks=blocks,
            probe=probe,
        )

    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return go(), recorder.steps
        except Stopped:
            stop.signal = None
            return go(), recorder.steps
