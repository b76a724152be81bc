"""SoFlow, solution flow models (Luo et al. 2025, arXiv 2512.15657): a jump ends at the same point if it starts later.

f(x_t, t, s) = x_t + (s - t) u(x_t, t, s) is the end of a jump. A step of velocity v leads from x_t to x_l, at the time
l = t - r (t - s). On a part of the batch, f(x_l, l, s) is the target of f(x_t, t, s), without gradients: it minimises
w |f(x_t, t, s) - f(x_l, l, s)|^2 / (2 (t - l) (t - s)). Its gradient is that of w |u - target|^2 / 2 with the target of
MeanFlow, but with a difference in place of the derivative. So it needs no derivative; its error is of order r, which
falls exponentially during training. On other samples s = t, which is flow matching. w is 1 / (|u - target|^2 + c)^p.

Deviations: v is a teacher's velocity by default, and may be that of its pairs. Of the two times that are drawn, the
larger one is t, and a step is at least 1e-4 long. The authors' trigonometric form and their guidance for training on
data alone are not implemented: use a guided teacher.
"""

from collections.abc import Iterator
from typing import Annotated, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from distill.flow import distances, laws, slopes, times
from distill.flow.interpolants import like
from distill.protocols import Batch, Context, Draw, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(slopes.PathOptions):
    """Options of shortcut/soflow."""

    diagonal: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """fraction of the batch with s = t"""
    to_data: Annotated[float, Field(ge=0, le=1)] = 0.0
    """fraction of the other samples with s = 0, as in sampling with one step; 1: sampling adds fresh noise"""
    first_step: Annotated[float, Field(gt=0, le=1)] = 0.1
    """length of a step relative to t - s, r, at the start of training"""
    last_step: Annotated[float, Field(gt=0, le=1)] = 0.002
    """r at the end of training; between, it falls exponentially"""
    diagonal_mu: float = -0.2
    """mean of logit(t) where s = t"""
    diagonal_sigma: PositiveFloat = 1.0
    """standard deviation of logit(t) where s = t"""
    mu: float = 0.2
    """mean of logit(t) elsewhere"""
    sigma: PositiveFloat = 0.8
    """standard deviation of logit(t) elsewhere"""
    s_mu: float = -1.0
    """mean of logit(s)"""
    s_sigma: PositiveFloat = 0.8
    """standard deviation of logit(s)"""
    power: Annotated[float, Field(ge=0, le=1)] = 1.0
    """exponent p of the weight of a sample; 0: no weighting"""
    c: PositiveFloat | None = None
    """c in this weight; null: 0.01"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.last_step > self.first_step:
            raise ValueError(f"last_step={self.last_step} is above first_step={self.first_step}; steps become shorter")
        if self.power == 0 and self.c is not None:
            raise ValueError("c has no effect with power: 0; remove it")
        own = {"diagonal_mu", "diagonal_sigma"} & self.model_fields_set
        if self.diagonal == 0 and own:
            raise ValueError(f"{', '.join(sorted(own))}: no effect with diagonal: 0; remove them")
        if self.to_data == 1 and (own := {"s_mu", "s_sigma"} & self.model_fields_set):
            raise ValueError(f"{', '.join(sorted(own))}: no effect with to_data: 1, where s = 0; remove them")
        return self

    @property
    def student(self) -> str:
        return "flow_map"


class Recipe:
    sampler: str = "jump"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.teacher = config, config.guide(teacher)
        self.sampler = "renoise" if config.to_data == 1 else "jump"

    def networks(self, init: Init) -> dict[str, Role]:
        return {"student": Trained(init.flow_map())}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        c, student = self.config, nets["student"]
        data, noise = c.ends(batch, ctx.draw)
        on_diagonal, _, rows = ctx.draw.split(c.diagonal, data)
        t, s = self.times(ctx.draw, data, on_diagonal)
        x_t, v = student.interpolant.mix(data, noise, t), student.interpolant.velocity(data, noise, t)
        if self.teacher is not None:
            with torch.no_grad():
                v = self.teacher(x_t, t, batch.cond)
        r = c.first_step * (c.last_step / c.first_step) ** ctx.progress
        cond = {name: value[rows] for name, value in batch.cond.items()}
        moved = laws.stepwise(student, x_t[rows], t[rows], s[rows], cond, v[rows], r)
        target = torch.where(like(on_diagonal, v), v, v.index_put((rows,), moved.to(v.dtype)))
        error = distances.mse(student(x_t, t, s, batch.cond), target)  # [B]
        weight = torch.where(on_diagonal, 1.0, 0.5) * (error.detach() + (c.c or 0.01)) ** -c.power
        return Loss((weight * error).mean(), {"error": error.detach().mean()})

    def times(self, draw: Draw, data: Tensor, on_diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """t and s <= t [B]; off the diagonal, they are at least 1e-4 apart."""
        c, u = self.config, draw.uniform("t", data)
        one = times.logit_normal(u, c.mu, c.sigma)
        other = times.logit_normal(draw.uniform("s", data), c.s_mu, c.s_sigma)
        other = other * (draw.uniform("to_data", data) >= c.to_data)
        t = torch.maximum(one, other).clamp(min=laws.SHORTEST)
        s = torch.minimum(torch.minimum(one, other), t - laws.SHORTEST)
        at = times.logit_normal(u, c.diagonal_mu, c.diagonal_sigma)
        return torch.where(on_diagonal, at, t), torch.where(on_diagonal, at, s)
