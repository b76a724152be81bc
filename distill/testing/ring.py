"""Eight modes on a ring in the plane, with their exact velocity as the teacher: does a recipe recover them?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from distill import solvers
from distill.data import DataSource
from distill.draws import Rows, permutation, sample_noise
from distill.metrics.wasserstein import sliced_wasserstein
from distill.protocols import Batch, Pairs, Source
from distill.spec import MixtureTeacher, MlpSpec
from distill.teachers.analytic import mixture_teacher

CPU = torch.device("cpu")
MEANS = [[3 * math.cos(k * math.pi / 4), 3 * math.sin(k * math.pi / 4)] for k in range(8)]
TEACHER = mixture_teacher(MixtureTeacher(kind="mixture", means=MEANS, std=0.2))
NETWORK = MlpSpec(kind="mlp", width=192, depth=3)
SAMPLES = 8192


@dataclass(frozen=True)
class Exact:
    """Samples of the ring as a data set. Fits `data.DataSet`."""

    data: Tensor
    name = "ring"
    shape = (2,)
    num_classes = None
    digest = TEACHER.digest

    def __len__(self) -> int:
        return len(self.data)

    def items(self, epoch: int, indices: Sequence[int]) -> tuple[Tensor, None]:
        return self.data[list(indices)], None


@dataclass(frozen=True)
class Solved:
    """Pairs of the teacher, in one order after another. Fits `protocols.Source`."""

    noise: Tensor
    data: Tensor
    batch_size: int

    def batch(self, step: int, rows: Rows) -> Batch:
        per_epoch = len(self.noise) // self.batch_size
        epoch, within = divmod(step, per_epoch)
        order = permutation(len(self.noise), "ring", epoch)[within * self.batch_size :][rows.start : rows.stop]
        return Batch(None, Pairs(self.noise[order], self.data[order]), {})


@lru_cache(maxsize=1)
def _data() -> Tensor:
    return TEACHER.exact_data(7, range(65536))


@lru_cache(maxsize=1)
def _pairs() -> tuple[Tensor, Tensor]:
    noise = sample_noise(4, range(16384), (2,))
    return noise, solvers.sample(TEACHER.field, noise, {}, solver="heun", steps=24)


@lru_cache(maxsize=1)
def _truth() -> tuple[Tensor, Tensor]:
    return TEACHER.exact_data(2, range(SAMPLES)), TEACHER.exact_data(3, range(SAMPLES))


def source(needs: frozenset[str], batch_size: int) -> Source:
    """Batches of the ring for a recipe that needs these."""
    if "pairs" in needs:
        return Solved(*_pairs(), batch_size)
    return DataSource(Exact(_data()), batch_size, 8)


def excess(samples: Tensor) -> float:
    """Sliced Wasserstein-2 to the ring, less what two samples of the ring itself are apart."""
    truth, again = _truth()
    return sliced_wasserstein(samples, truth) - sliced_wasserstein(again, truth)
