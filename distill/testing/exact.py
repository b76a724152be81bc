"""Building blocks for closed-form checks: exact networks and teachers in float64, and draws with fixed values.

A recipe gets the exact solution as its network. Its loss, or the gradient of the loss, is then known.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distill.flow.conditioning import of_classes
from distill.flow.draws import Rows, Split, StepDraw, generator
from distill.flow.interpolants import like, linear
from distill.flow.times import uniform_grid
from distill.protocols import Batch, Cond, Conditioning, Copy, Nets, Recipe, VelocityField
from distill.teachers.analytic import GaussianField
from distill.teachers.loaded import LoadedTeacher
from distill.testing.closed_form import GaussianFlowMap
from distill.training.engine import StepContext

MEAN = torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64)
STD = torch.tensor([0.5, 1.3, 0.2], dtype=torch.float64)  # unequal values, since some mistakes cancel if all are 1
FIELD, FLOW_MAP = GaussianField(MEAN, STD), GaussianFlowMap(MEAN, STD)


def teacher(velocity: VelocityField, shape: tuple[int, ...] = (3,)) -> LoadedTeacher:
    """An unconditional teacher with any velocity field."""
    return LoadedTeacher(velocity, shape, None, None, digest="0" * 64, description="an exact teacher")


class Network(nn.Module):
    """A function as a network for the linear path: of (x_t, t, cond), (x_t, t, s, cond) or (x_t, t, v, cond)."""

    interpolant = linear()
    t_range = (0.0, 1.0)

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given: Tensor | Cond | None) -> Tensor | tuple[Tensor, Tensor]:
        return self.function(*given)


def straight(mean: Tensor | float, std: Tensor | float) -> Network:
    """The velocity of the straight paths from noise to mean + std * noise, which is `FIELD` after reflow."""

    def velocity(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        t = like(t, x_t).double()
        return -mean + (1 - std) * (x_t - (1 - t) * mean) / ((1 - t) * std + t)

    return Network(velocity)


STRAIGHT = straight(MEAN, STD)


@dataclass(frozen=True)
class Given:
    """Returns given networks. Implements `protocols.Init`."""

    student: nn.Module
    judge: nn.Module = field(default_factory=lambda: Network(lambda x_t, t, cond: (x_t, t)))
    num_classes: int | None = None

    @property
    def conditioning(self) -> Conditioning:
        return of_classes(self.num_classes, self.num_classes)

    def velocity_field(self) -> nn.Module:
        return self.student

    def flow_map(self, to_data: bool = False) -> nn.Module:
        return self.student

    def policy(self, policy: str, count: int, grid: Sequence[float] | None = None, spread: float = 0.0) -> nn.Module:
        return self.student

    def acceleration(self) -> nn.Module:
        return self.student

    def critic(self) -> nn.Module:
        return self.judge

    def t_grid(self, steps: int) -> list[float]:
        return uniform_grid(steps).tolist()

    def null(self, cond: Cond) -> Cond:
        return {name: torch.full_like(value, self.num_classes or 0) for name, value in cond.items()}


@dataclass(frozen=True)
class Draws:
    """The draws of a step, with some replaced by given values, by name. Implements `protocols.Draw`."""

    draw: StepDraw
    normals: Mapping[str, Tensor]
    uniforms: Mapping[str, float]

    def normal(self, name: str, like: Tensor) -> Tensor:
        return self.normals[name] if name in self.normals else self.draw.normal(name, like)

    def uniform(self, name: str, like: Tensor) -> Tensor:
        drawn = self.draw.uniform(name, like)
        return torch.full_like(drawn, self.uniforms[name]) if name in self.uniforms else drawn

    def integer(self, name: str, below: int) -> int:
        return self.draw.integer(name, below)

    def split(self, fraction: float, like: Tensor) -> Split:
        return self.draw.split(fraction, like)


def context(
    count: int,
    *,
    step: int = 0,
    images: int = 0,
    progress: float = 0.0,
    normals: Mapping[str, Tensor] | None = None,
    uniforms: Mapping[str, float] | None = None,
) -> StepContext:
    """The context of a step with a batch of `count` in a single micro-batch. normals, uniforms: see `Draws`."""
    draw = Draws(StepDraw(0, step, 0, Rows(0, count, count)), normals or {}, uniforms or {})
    return StepContext(step, images, draw, {}, progress)


def batch(count: int, *, seed: int = 0) -> Batch:
    """A batch of data of `FIELD`, [count, 3]."""
    latent = torch.randn(count, 3, generator=generator("exact", seed), dtype=torch.float64)
    return Batch(MEAN + STD * latent, None, {})


def posterior(x_t: Tensor, t: float, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples (data, noise), each [count, 3], of the posterior given x_t [3] at time t."""
    q_squared = (1 - t) ** 2 * STD.square() + t**2
    mean = MEAN + (1 - t) * STD.square() / q_squared * (x_t - (1 - t) * MEAN)  # E[data | x_t]
    std = STD * t / q_squared.sqrt()
    latent = torch.randn(count, 3, generator=generator("posterior", seed), dtype=torch.float64)
    data = mean + std * latent
    return data, (x_t - (1 - t) * data) / t


def nets(recipe: Recipe, init: Given) -> Nets:
    """The networks of a recipe's roles. A `Copy` is the same network as its original."""
    roles = recipe.networks(init)
    own = {name: role.module for name, role in roles.items() if not isinstance(role, Copy)}
    return own | {name: own[role.of] for name, role in roles.items() if isinstance(role, Copy)}
