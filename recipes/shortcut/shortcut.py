"""Shortcut models (Frans et al. 2024, arXiv 2410.12557, alg. 1): one step of size d equals two of its own of size d/2.

On a grid of M = 2^L steps, the finest step, d = 1/M, is learnt by flow matching. For a part of the batch, larger steps,
d = 2/M ... 1, are learnt from the mean of two half steps of an averaged copy of the student, eq. (5).

With a frozen teacher (our own derivation, checked in closed form), `base` sets the target of the finest step. With
`base: velocity`, it is the teacher's velocity at x_t: at the optimum, M steps of the student are M Euler steps of the
teacher. With `base: step`, it is the teacher's Heun step of size 1/M, which is closer to its ODE. `base: two_steps` is
like velocity, but for d = 2/M, the half steps are the teacher's Euler steps.

Deviations: the network is given d as two times, t and s = t - d. Sizes d are drawn at random, not distributed equally.
The authors clip states and targets at 4, which suits latents of unit variance; we do not. Their guidance for training
on data alone is not implemented: use a guided teacher. With dropout and target_decay: null, the half steps get
different masks.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from distill.flow import distances, solvers
from distill.flow.guidance_options import GuidanceScale
from distill.flow.interpolants import like
from distill.protocols import Batch, Cond, Context, Copy, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(BaseModel):
    """Options of shortcut/shortcut."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    base: Literal["velocity", "step", "two_steps", "data"] = "velocity"
    """target of the finest step: velocity, step and two_steps use the teacher; data: noise - data, no teacher"""
    guidance_scale: GuidanceScale = 1.0
    """guidance scale of the teacher, which the student learns; 1: no guidance; [low, high]: it is an input"""
    grid: Annotated[int, Field(gt=0, le=100_000)] = 128
    """number of steps of the finest grid, M, a power of two"""
    bootstrap: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """fraction of the batch whose target is two half steps"""
    target_decay: Annotated[float, Field(ge=0, lt=1)] | None = 0.999
    """decay per step of the EMA that makes the half steps; null: the student itself makes them"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.grid < 2 or self.grid & (self.grid - 1):
            raise ValueError(f"grid: {self.grid} is not a power of two; valid: 2, 4, 8, ...")
        if self.base == "data" and self.guidance_scale != 1:
            raise ValueError("guidance_scale has no effect with base: data; remove it, or use a base of the teacher")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"data"} if self.base == "data" else {"data", "teacher"})

    @property
    def student(self) -> str:
        return "flow_map"


class Recipe:
    sampler = "jump"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.finest = config, 1 / config.grid
        self.trained_steps = [2**level for level in range(config.grid.bit_length())]  # 1, 2, 4, ..., M
        self.teacher = None if teacher is None or config.base == "data" else teacher.guided(config.guidance_scale)

    def networks(self, init: Init) -> dict[str, Role]:
        roles: dict[str, Role] = {"student": Trained(init.flow_map())}
        if self.config.target_decay is not None:
            roles["target"] = Copy("student", self.config.target_decay)
        return roles

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.data is not None
        c, data, student, path = self.config, batch.data, nets["student"], nets["student"].interpolant
        taught, bootstrapped, others = ctx.draw.split(c.bootstrap, data)  # those that learn from two half steps
        level = (ctx.draw.uniform("level", data) * (c.grid.bit_length() - 1)).floor()
        d = torch.where(taught, 2**-level, self.finest)  # 1, 1/2, ..., 2/M; or 1/M
        t = d * ((ctx.draw.uniform("t", data) / d).floor() + 1)  # a multiple of d in (0, 1]
        noise = ctx.draw.normal("noise", data)
        x_t, target = path.mix(data, noise, t), path.velocity(data, noise, t)

        def teach(mask: Tensor, rows: Tensor, lesson: Callable[[Tensor, Tensor, Tensor, Cond], Tensor]) -> None:
            u = lesson(x_t[rows], t[rows], d[rows], {name: value[rows] for name, value in batch.cond.items()})
            target[rows] = torch.where(like(mask[rows], u), u, target[rows])

        with torch.no_grad():
            if self.teacher is not None:
                teach(~taught, others, self.finest_step)
            teach(taught, bootstrapped, lambda *given: self.two_half_steps(nets.get("target", student), *given))
        return Loss(distances.mse(student(x_t, t, t - d, batch.cond), target).mean())

    def finest_step(self, x_t: Tensor, t: Tensor, d: Tensor, cond: Cond) -> Tensor:
        """The teacher's velocity at x_t, or its average velocity over a Heun step of size d = 1/M."""
        assert self.teacher is not None
        if self.config.base != "step":
            return self.teacher(x_t, t, cond)
        return (x_t - solvers.step(self.teacher, x_t, t, t - d, cond, "heun")) / self.finest

    def two_half_steps(self, copy: nn.Module, x_t: Tensor, t: Tensor, d: Tensor, cond: Cond) -> Tensor:
        """The mean of the average velocities of two steps of size d/2, eq. (5)."""
        half = d / 2

        def average(x: Tensor, at: Tensor) -> Tensor:
            u = copy(x, at, at - half, cond)
            if self.config.base != "two_steps" or self.teacher is None:
                return u
            return torch.where(like(half > self.finest, x), u, self.teacher(x, at, cond))

        first = average(x_t, t)
        return (first + average(x_t - like(half, x_t) * first, t - half)) / 2
