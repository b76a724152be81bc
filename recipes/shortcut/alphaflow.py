"""AlphaFlow (Zhang et al. 2025, arXiv 2510.20771): from flow matching of whole jumps to MeanFlow, in one training.

A step of velocity v leads from x_t to x_m, at the time m = t - alpha (t - s). On a part of the batch, the target of
u(x_t, t, s) is alpha v + (1 - alpha) u(x_m, m, s), without gradients, and the loss is alpha e / (e + c), where e is the
squared error. alpha = 1 is flow matching of the whole jump, which is easy to learn and not the flow map; for
alpha -> 0, this is MeanFlow. alpha falls from 1 to 0 in a window of the training, like a sigmoid, and is taken as 1
above 0.995 and as 0 below 0.005: for the first 29% of the window and from 71% on. There the loss is MeanFlow's, with
the derivative. On the other samples s = t, which is flow matching, with the loss e / (e + c).

Deviations: v is a teacher's velocity by default, and may be that of its pairs. The times are those of MeanFlow, and c
is 0.001; both are unverified. A step is at least 1e-4 long. With dropout, the prediction and its target get different
masks. The authors' guidance for training on data alone is not implemented: use a guided teacher.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from distill.flow import distances, laws, slopes, times
from distill.flow.interpolants import like
from distill.protocols import Batch, Cond, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn

LEAST = 0.005  # alpha below it is 0, and above 1 - LEAST it is 1


class Config(slopes.SlopeOptions):
    """Options of shortcut/alphaflow."""

    window_start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """progress of the training, 0 to 1, at which the window begins in which alpha falls"""
    window_end: Annotated[float, Field(gt=0, le=1)] = 1.0
    """progress of the training at which the window ends"""
    sharpness: Annotated[float, Field(ge=12)] = 25.0
    """how fast alpha falls in the middle of the window; from 12 on, it reaches 0 within the window"""
    diagonal: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """fraction of the batch with s = t"""
    to_data: Annotated[float, Field(ge=0, le=1)] = 0.0
    """fraction of the other samples with s = 0, as in sampling with one step; 1: sampling adds fresh noise"""
    mu: float = -0.4
    """mean of logit(t) and logit(s); the larger of the two times is t"""
    sigma: PositiveFloat = 1.0
    """standard deviation of logit(t) and logit(s)"""
    clip: PositiveFloat | None = None
    """bound of the elements of the target where s < t; null: none"""
    c: PositiveFloat = 1e-3
    """c in the loss of a sample, e / (e + c)"""

    @model_validator(mode="after")
    def _is_a_window(self) -> Self:
        if self.window_end <= self.window_start:
            raise ValueError(f"window_end={self.window_end} must be above window_start={self.window_start}")
        return self

    @property
    def student(self) -> str:
        return "flow_map"

    def alpha(self, progress: float) -> float:
        """alpha at this progress of the training."""
        place = (progress - self.window_start) / (self.window_end - self.window_start)
        alpha = 1 / (1 + math.exp(self.sharpness * min(max(place - 0.5, -0.5), 0.5)))
        return 1.0 if alpha > 1 - LEAST else 0.0 if alpha < LEAST else alpha


class Recipe:
    sampler: str = "jump"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.teacher = config, config.guide(teacher)
        self.sampler = "renoise" if config.to_data == 1 else "jump"

    def networks(self, init: Init) -> dict[str, Role]:
        return {"student": Trained(self.config.checked(init.flow_map()))}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        c, student, alpha = self.config, nets["student"], self.config.alpha(ctx.progress)
        (data, noise), path = c.ends(batch, ctx.draw), student.interpolant
        one, other = (times.logit_normal(ctx.draw.uniform(name, data), c.mu, c.sigma) for name in ("t", "s"))
        t, (on_diagonal, _, rows) = torch.maximum(one, other), ctx.draw.split(c.diagonal, data)
        s = torch.minimum(one, other) * (ctx.draw.uniform("to_data", data) >= c.to_data)
        s = torch.where(on_diagonal, t, s)  # [B], s <= t
        x_t, v = path.mix(data, noise, t), path.velocity(data, noise, t)
        if self.teacher is not None:
            with torch.no_grad():
                v = self.teacher(x_t, t, batch.cond)
        u, cond = student(x_t, t, s, batch.cond), {name: value[rows] for name, value in batch.cond.items()}
        right = self.target(student, (x_t[rows], t[rows], s[rows]), cond, v[rows], u.detach()[rows], alpha)
        target = torch.where(like(on_diagonal, v), v, v.index_put((rows,), right.to(v.dtype)))
        error = distances.mse(u, target)  # [B]
        weight = torch.where(on_diagonal, 1.0, alpha or 1.0) / (error.detach() + c.c)
        logs = {"error": error.detach().mean(), "alpha": torch.full_like(error[0].detach(), alpha)}
        return Loss((weight * error).mean(), logs)

    def target(
        self, student: nn.Module, at: tuple[Tensor, Tensor, Tensor], cond: Cond, v: Tensor, u: Tensor,
        alpha: float,
    ) -> Tensor:  # fmt: skip
        """The target of u = u(x_t, t, s) at (x_t, t, s) = `at`, where s < t: alpha v + (1 - alpha) u(x_m, m, s)."""
        x_t, t, s = at
        if alpha == 1:
            right = v
        elif alpha == 0:
            right = v - like(t - s, x_t) * self.config.slope(student, x_t, t, s, v, cond)
        else:  # the same as the formula, but precise for small alpha, as u and u(x_m, m, s) are then nearly equal
            right = u + alpha * (laws.stepwise(student, x_t, t, s, cond, v, alpha) - u)
        return right if self.config.clip is None else right.clamp(-self.config.clip, self.config.clip)
