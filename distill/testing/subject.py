"""A recipe under test, and small things for it to train on."""

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
    """How long to train on the ring."""

    images: int
    batch_size: int = 512
    lr: float = 3e-3


@dataclass(frozen=True, eq=False)  # compared by identity: what was found of one is found once
class Subject:
    """A recipe, and what its test file declares of it.

    options: what it is tested with beside its defaults. ring: options that suit the ring.
    steps: the numbers of steps that its students are made for. times: of the states of its pairs, where it needs them.
    short, long: trainings on the ring of about 15 and 90 seconds of one CPU core.
    closed_form: checks at its exact solution, which raise AssertionError.
    base: where a recipe ./file.py lies.
    """

    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ring: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = (1,)
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
        """Whether it needs none, and its student is what a teacher is: followed along any grid."""
        few_steps = issubclass(self.module.Recipe, Gridded)
        return self.config().student == "velocity" and not self.config().needs & {"teacher", "pairs"} and not few_steps


@dataclass(frozen=True)
class Noise:
    """Images and pairs of noise, with classes: nothing to learn, but like anything else. Fits `protocols.Source`.

    times: of the states of the pairs, 1 ... 0.
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
    """An untrained U-Net of 8x8 images and ten classes."""
    network = build(UNET, SHAPE, CLASSES, seed=1).eval().requires_grad_(False)
    generators = ((parameter, generator("teacher", index)) for index, parameter in enumerate(network.parameters()))
    with torch.no_grad():
        for parameter, numbers in generators:  # a fresh network's last layers are nearly zero
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
    """The recipe and its networks on images: fresh ones, as some recipes have nothing to learn at their teacher."""
    teacher = unet_teacher()
    return subject.module.Recipe(subject.config(), teacher), StudentInit(None, UNET, SHAPE, CLASSES, seed=0), teacher


def bits(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """For comparisons to the last bit."""
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in tensors.items()}
