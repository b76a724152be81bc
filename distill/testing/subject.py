"""A recipe under test, and a small data source and teacher for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from distill.flow.draws import Rows, generator, sample_labels
from distill.flow.interpolants import linear
from distill.networks.architectures import build
from distill.networks.velocity import TIME_SCALE
from distill.protocols import Batch, Gridded, Pairs, Recipe
from distill.spec import registry
from distill.spec.model import UNetSpec
from distill.students.init import StudentInit
from distill.teachers.loaded import LoadedTeacher
from distill.teachers.network_field import NetworkField

SHAPE, CLASSES = (1, 8, 8), 10
UNET = UNetSpec(kind="unet", channels=[8], norm_groups=4, attention=True)


@dataclass(frozen=True)
class Training:
    """Length and settings of a training on the ring."""

    images: int
    batch_size: int = 512
    lr: float = 3e-3


@dataclass(frozen=True, eq=False)  # hashed by identity, so that the results of a subject can be cached
class Subject:
    """A recipe and the settings of its tests.

    recipe: name of the recipe. options: options for all tests; others have their defaults.
    ring: additional options for the ring. steps: numbers of steps that its students are made for.
    frequencies: of the network for the ring, see `MlpSpec`.
    times: times of the states of its pairs, if it needs states.
    short, long: trainings on the ring that take about 15 and 90 seconds on one CPU core.
    closed_form: checks at the exact solution, which raise AssertionError.
    base: folder of a recipe ./file.py.
    """

    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ring: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = (1,)
    frequencies: int = 16
    times: tuple[float, ...] = (1.0, 0.5, 0.0)
    short: Training = Training(512_000)
    long: Training = Training(3_000_000)
    closed_form: tuple[Callable[[], None], ...] = ()
    base: Path = Path()

    @cached_property
    def module(self) -> ModuleType:
        return registry.load(self.recipe, self.base)

    def config(self, options: Mapping[str, Any] | None = None) -> registry.RecipeConfig:
        return registry.configure(self.recipe, self.module, {**self.options, **(options or {})}, self.recipe)

    @property
    def makes_teacher(self) -> bool:
        """Whether it trains a teacher: it needs no teacher, and its student is a velocity field for any time grid."""
        few_steps = issubclass(self.module.Recipe, Gridded)
        return self.config().student == "velocity" and not self.config().needs & {"teacher", "pairs"} and not few_steps


@dataclass(frozen=True)
class Noise:
    """Random images and pairs with classes, in the format of real ones. Implements `protocols.Source`.

    times: times of the states of the pairs, from 1 to 0.
    """

    batch_size: int
    times: tuple[float, ...] = (1.0, 0.5, 0.0)

    def batch(self, step: int, rows: Rows) -> Batch:
        names = ("data", "noise", "ends", *map(str, self.times[1:-1]))
        data, noise, ends, *between = (
            torch.randn(self.batch_size, *SHAPE, generator=generator("subject", step, name))[rows.start : rows.stop]
            for name in names
        )
        states = torch.stack([noise, *between, ends.tanh()], dim=1)  # [B, K, ...]
        times = torch.tensor(self.times).expand(len(states), -1)
        labels, others = (
            {"class_labels": sample_labels(range(first + rows.start, first + rows.stop), CLASSES)}
            for first in (step, step + 3)
        )
        return Batch(data.tanh(), Pairs(noise, ends.tanh(), states, times), labels, others)


def unet_teacher() -> LoadedTeacher:
    """A teacher with an untrained U-Net for 8x8 images and ten classes."""
    network = build(UNET, SHAPE, CLASSES, seed=1).eval().requires_grad_(False)
    generators = ((parameter, generator("teacher", index)) for index, parameter in enumerate(network.parameters()))
    with torch.no_grad():
        for parameter, numbers in generators:  # noise is added, as the last layers of a new network are nearly zero
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=numbers))
    return LoadedTeacher(
        field=NetworkField(network, linear(), "velocity", TIME_SCALE),
        shape=SHAPE,
        num_classes=CLASSES,
        null_class=CLASSES,
        digest="1" * 64,
        description="an untrained U-Net",
        network=network,
    )


def start(subject: Subject) -> tuple[Recipe, StudentInit, LoadedTeacher]:
    """(recipe, init, teacher) for images. The student starts from a new network.

    If it started from the teacher, some recipes would have nothing to learn.
    """
    teacher = unet_teacher()
    return subject.module.Recipe(subject.config(), teacher), StudentInit(None, UNET, SHAPE, CLASSES, seed=0), teacher


def bits(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The tensors as bytes, for bitwise comparison."""
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in tensors.items()}
