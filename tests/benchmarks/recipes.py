"""What a step of each recipe costs, relative to flow matching: python -m tests.benchmarks recipes.

On the U-Net of the digits preset, batches of 128, recipes at their defaults. A step ends when the student has moved, so
that turns of other networks count. Recipes take turns, medians are compared; recipes/costs.json keeps the ratios.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from distill.core.atomic import write_json
from distill.core.stop import StopRequest
from distill.flow.interpolants import linear
from distill.networks.architectures import build
from distill.networks.velocity import TIME_SCALE
from distill.runs.progress import Progress
from distill.runs.run_store import StagePaths
from distill.spec import registry
from distill.spec.model import OptimizerSpec, TrainStage, UNetSpec
from distill.students.init import StudentInit
from distill.teachers.loaded import LoadedTeacher
from distill.teachers.network_field import NetworkField
from distill.testing.subject import CLASSES, SHAPE, Noise
from distill.training import engine

BATCH, MOVES, ROUNDS = 128, 6, 3
NETWORK = build(UNetSpec(kind="unet", channels=[32, 48]), SHAPE, CLASSES, 0).eval().requires_grad_(False)
TEACHER = LoadedTeacher(
    NetworkField(NETWORK, linear(), "velocity", TIME_SCALE), SHAPE, CLASSES, CLASSES, "0" * 64, "a U-Net", NETWORK
)


class Moves(Progress):
    """Notes when the student has moved."""

    def __init__(self) -> None:
        super().__init__("recipes", MOVES * BATCH, "images", None)
        self.times: list[float] = []

    def update(self, done: int, *logs: Mapping[str, float]) -> None:
        if done > BATCH * len(self.times):
            self.times.append(time.perf_counter())


def seconds(name: str) -> list[float]:
    """Of each step but the first."""
    module, moves = registry.load(name, Path()), Moves()
    stage = TrainStage(kind="train", recipe=name, images=MOVES * BATCH, batch_size=BATCH, optimizer=OptimizerSpec())
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
        engine.train(
            module.Recipe(module.Config(), TEACHER),
            StudentInit(TEACHER, None, SHAPE, CLASSES, 0),
            Noise(BATCH),
            stage,
            seed=0,
            device=torch.device("cpu"),
            micro_batch=BATCH,
            paths=StagePaths(Path(folder)),
            progress=moves,
            stop=stop,
        )
    return [b - a for a, b in zip(moves.times, moves.times[1:], strict=False)]


def bench_recipes() -> str:
    """A table of ratios."""
    taken: dict[str, list[float]] = {name: [] for name in registry.names()}
    for _ in range(ROUNDS):
        for name, found in taken.items():
            found += seconds(name)
    medians = {name: statistics.median(found) for name, found in taken.items()}
    costs = {name: round(median / medians["pretrain/flow_matching"], 1) for name, median in medians.items()}
    write_json(registry.package_folder() / registry.COSTS, costs)
    return json.dumps(costs, indent=2)
