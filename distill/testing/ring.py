"""Test whether a recipe recovers eight modes on a ring in the plane. The teacher is their exact velocity."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.core.stop import StopRequest
from distill.data import DataSource
from distill.data.source import Items
from distill.evaluation.metrics.wasserstein import sliced_wasserstein
from distill.flow import solvers
from distill.flow.draws import Rows, permutation, sample_noise
from distill.protocols import Batch, Pairs, Source, VelocityField
from distill.runs.progress import Progress
from distill.runs.run_store import StagePaths
from distill.spec.model import MixtureTeacher, MlpSpec, OptimizerSpec, TrainStage
from distill.students import sampling
from distill.students.init import StudentInit
from distill.teachers.analytic import mixture_teacher
from distill.testing.subject import Subject, Training
from distill.training import engine

MEANS = [[3 * math.cos(k * math.pi / 4), 3 * math.sin(k * math.pi / 4)] for k in range(8)]
TEACHER = mixture_teacher(MixtureTeacher(kind="mixture", means=MEANS, std=0.2))
NETWORK = MlpSpec(kind="mlp", width=192, depth=3)
SAMPLES = 8192


@dataclass(frozen=True)
class Exact:
    """Samples of the ring as a data set. Implements `data.DataSet`."""

    data: Tensor
    name = "ring"
    shape = (2,)
    buckets = None
    num_classes = None
    prompts = None
    encoded = False
    digest = TEACHER.digest

    def __len__(self) -> int:
        return len(self.data)

    def items(self, epoch: int, indices: Sequence[int]) -> Items:
        return Items(self.data[list(indices)])


@dataclass(frozen=True)
class Solved:
    """Batches of solved paths of the teacher, in a new random order per epoch. Implements `protocols.Source`.

    states: [N, K, ...] at times [K], from 1 to 0. real: a source of real data for the same batches; None: no data.
    """

    states: Tensor
    times: Tensor
    batch_size: int
    real: Source | None

    def batch(self, step: int, rows: Rows) -> Batch:
        per_epoch = len(self.states) // self.batch_size
        epoch, within = divmod(step, per_epoch)
        order = permutation(len(self.states), "ring", epoch)[within * self.batch_size :][rows.start : rows.stop]
        states = self.states[order]
        pairs = Pairs(states[:, 0], states[:, -1], states, self.times.expand(len(states), -1))
        return Batch(None if self.real is None else self.real.batch(step, rows).data, pairs, {})


def exact(seed: int, count: int) -> Tensor:
    """Exact samples of the ring, [count, 2]."""
    assert TEACHER.exact_data is not None
    return TEACHER.exact_data(seed, range(count))


@lru_cache(maxsize=2)
def _paths(times: tuple[float, ...]) -> Tensor:
    """States of 16,384 paths at these times, [N, K, 2], solved with 24 Heun steps between consecutive times."""
    states = [sample_noise(4, range(16384), (2,))]
    with torch.no_grad():
        for t, s in itertools.pairwise(times):
            t_grid = torch.linspace(t, s, 25, dtype=torch.float64)
            states.append(solvers.integrate("heun", TEACHER.field, states[-1], t_grid, {}))
    return torch.stack(states, dim=1)


@lru_cache(maxsize=1)
def _truths() -> tuple[list[Tensor], float]:
    """(sets of exact samples, average distance between two of them)."""
    sets = [exact(seed, SAMPLES) for seed in range(20, 25)]
    apart = [sliced_wasserstein(a, b) for a, b in itertools.combinations(sets, 2)]
    return sets, sum(apart) / len(apart)


def source(needs: frozenset[str], times: tuple[float, ...], batch_size: int) -> Source:
    """Batches of the ring for a recipe with these needs. times: times of the states of its pairs."""
    real = DataSource(Exact(exact(7, 65536)), batch_size, 8)
    if "pairs" not in needs:
        return real
    kept = times if "states" in needs else (1.0, 0.0)
    return Solved(_paths(kept), torch.tensor(kept), batch_size, real if "data" in needs else None)


def excess(samples: Tensor) -> float:
    """Sliced Wasserstein-2 distance to the ring, minus the average distance between two sets of exact samples."""
    sets, floor = _truths()
    return sum(sliced_wasserstein(samples, each) for each in sets) / len(sets) - floor


def noise() -> Tensor:
    """The noise of the samples that are compared. It is in no training pair."""
    return sample_noise(1, range(100_000, 100_000 + SAMPLES), (2,))


def of_field(field: VelocityField, solver: str, steps: int) -> float:
    """The excess (see `excess`) of samples of a velocity field."""
    return excess(solvers.solve(field, noise(), {}, solver=solver, steps=steps))


def network_of(subject: Subject) -> MlpSpec:
    return NETWORK.model_copy(update={"frequencies": subject.frequencies})


def trained(subject: Subject, training: Training, folder: Path) -> nn.Module:
    """Train a student from a new network with the training engine."""
    config = subject.config(subject.ring)
    recipe, batch = subject.module.Recipe(config, TEACHER), training.batch_size
    stage = TrainStage(
        kind="train",
        recipe=subject.recipe,
        images=training.images // batch * batch,
        batch_size=batch,
        optimizer=OptimizerSpec(lr=training.lr, warmup_images=training.images // 30, decay="cosine"),
    )
    with Progress("ring", stage.images, "images", None) as progress:
        result = engine.train(
            recipe,
            StudentInit(None, network_of(subject), (2,), None, seed=0),
            source(config.needs, subject.times, batch),
            stage,
            seed=0,
            device=torch.device("cpu"),
            micro_batch=batch,
            paths=StagePaths(folder),
            progress=progress,
            stop=StopRequest(),
        )
    return result.roles.networks["student"].eval()


def recovers(subject: Subject, training: Training, folder: Path) -> dict[str, dict[int, float]]:
    """Train on the ring, and return {"student": {steps: excess}, "teacher": {steps: excess}}.

    The teacher uses Euler steps. For a recipe that makes a teacher, "student" is the trained network and "teacher" the
    untrained one, both with a fine solver.
    """
    student = trained(subject, training, folder)
    if subject.makes_teacher:
        untrained = StudentInit(None, network_of(subject), (2,), None, seed=0).velocity_field().eval()
        return {"student": {24: of_field(student, "heun", 24)}, "teacher": {24: of_field(untrained, "heun", 24)}}
    recipe = subject.module.Recipe(subject.config(subject.ring), TEACHER)
    t_grids, sampler, found = sampling.own_grids(recipe, subject.times), recipe.sampler, {}
    for steps in subject.steps:
        fresh = sampling.fresh_noises(1, range(SAMPLES), (2,), sampling.num_fresh(sampler, steps))
        t_grid = sampling.grid(t_grids, steps)
        found[steps] = excess(sampling.by_sampler(student, sampler, noise(), t_grid, {}, fresh))
    return {"student": found, "teacher": {n: of_field(TEACHER.field, "euler", n) for n in {1, *subject.steps}}}
