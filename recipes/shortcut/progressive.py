"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512): one step of the student is two of its teacher.

The student has N steps, its teacher 2 N. From noised data at t = i/N, the teacher takes two Euler steps of 1/(2 N), and
the student learns the one velocity that leads to the same place: the mean of the teacher's two. A chain of stages, each
with `teacher` and `init` of the one before and half its `steps`, ends at one step. Only its first stage is guided.

`weight` is that of the paper for the error of the data, which is t^2 times that of the velocity: truncated is
max(SNR, 1) and plus_one SNR + 1, with SNR = ((1 - t) / t)^2. `distance: l1` is ProDiff's (Huang et al. 2022, arXiv
2207.06389). Deviations: the path is linear, where Euler steps are those of DDIM; nothing is clipped. With more
`teacher_steps`, a stage does the work of several, at the cost of more calls.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distill.flow.guidance_options import GuidanceScale
from distill.flow.times import uniform_grid
from distill.protocols import Batch, Cond, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(BaseModel):
    """Options of shortcut/progressive."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    steps: Annotated[int, Field(gt=0, le=100_000)] = 1
    """number of Euler steps of the student, N"""
    teacher_steps: Annotated[int, Field(gt=1, le=1000)] = 2
    """Euler steps of the teacher for one of the student"""
    guidance_scale: GuidanceScale = 1.0
    """guidance scale of the teacher, which the student learns; 1: no guidance; [low, high]: it is an input"""
    weight: Literal["truncated", "plus_one", "data", "velocity"] = "truncated"
    """weight of times: truncated, plus_one: see above; data: the error of the data itself; velocity: of the velocity"""
    distance: Literal["l2", "l1"] = "l2"
    """mean square, or mean absolute value, of the error"""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"data", "teacher"})

    @property
    def student(self) -> str:
        return "velocity"


class Recipe:
    sampler = "euler"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.teacher = config, None if teacher is None else teacher.guided(config.guidance_scale)

    def networks(self, init: Init) -> dict[str, Role]:
        return {"student": Trained(init.velocity_field())}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def t_grids(self, times: Sequence[float] | None) -> Mapping[int, Sequence[float]]:
        return {self.config.steps: uniform_grid(self.config.steps).tolist()}

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.data is not None
        n, data, student = self.config.steps, batch.data, nets["student"]
        t = ((ctx.draw.uniform("t", data) * n).floor() + 1) / n  # [B], on {1/n, ..., 1}
        x_t = student.interpolant.mix(data, ctx.draw.normal("noise", data), t)
        error = student(x_t, t, batch.cond) - self.target(x_t, t, batch.cond)
        size = (error.square() if self.config.distance == "l2" else error.abs()).flatten(1).mean(1)
        return Loss((self.factor(t) * size).mean())

    @torch.no_grad()
    def target(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The mean velocity of the teacher's steps from x_t [B, ...] at times t [B]."""
        assert self.teacher is not None
        k, x, total = self.config.teacher_steps, x_t, torch.zeros_like(x_t)
        for i in range(k):
            at = t - i / (self.config.steps * k)
            v = self.teacher(x, at, cond)
            x, total = x - v / (self.config.steps * k), total + v
        return total / k

    def factor(self, t: Tensor) -> Tensor:
        """The weight of the error of the velocity at times t, [B]."""
        signal, noise = (1 - t).square(), t.square()
        square = {
            "truncated": torch.maximum(signal, noise),
            "plus_one": signal + noise,
            "data": noise,
            "velocity": torch.ones_like(t),
        }[self.config.weight]
        return square if self.config.distance == "l2" else square.sqrt()
