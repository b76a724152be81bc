"""MeanFlow (Geng et al. 2025, arXiv 2505.13447): learn the average velocity from the identity that defines it.

The identity is u(x_t, t, s) = v - (t - s) Du, eq. (6), where Du is the derivative of u along (v, 1, 0). Its right side
is the target, without gradients; Du takes one forward-mode call. On a fixed part of the batch s = t, which is flow
matching. If v is a sample, noise - data, the identity holds only in expectation. `tangent: predicted` is improved
MeanFlow (Geng et al. 2025, arXiv 2512.02012) with the student's own velocity u(x_t, t, t): the derivative is then not
random. With `velocity: pairs`, the paths are the nearly straight ones of a rectified flow (Re-MeanFlow).

With `omega`, v is a mix of noise - data and the student's own velocities, with and without condition, so that it learns
a guided velocity from data alone. Part of the samples with s = t then lose their condition; there, v is not mixed.

Deviations: with a teacher, v is its velocity at noised real data, as in NVIDIA's FastGen. The error is a mean over
elements, so c does not depend on their number; theirs is a sum, with c = 0.01. With dropout, the derivative and the
prediction get different masks. Conditions are dropped at random; theirs are a fixed number.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from distill.flow import distances, own_guidance, slopes, times
from distill.flow.fields import drop_condition
from distill.flow.interpolants import like
from distill.protocols import Batch, Cond, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(slopes.SlopeOptions, own_guidance.OwnGuidanceOptions):
    """Options of shortcut/meanflow."""

    tangent: Literal["sampled", "predicted"] = "sampled"
    """direction of the derivative: that of v, or the student's own velocity u(x_t, t, t), as in improved MeanFlow"""
    diagonal: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """fraction of the batch with s = t"""
    to_data: Annotated[float, Field(ge=0, le=1)] = 0.0
    """fraction of the other samples with s = 0, as in sampling with one step; 1: sampling adds fresh noise"""
    time_law: Literal["logit_normal", "uniform"] = "logit_normal"
    """distribution of the two times; the larger one is t, the other one s"""
    mu: float = -0.4
    """mean of logit(t) under logit_normal"""
    sigma: PositiveFloat = 1.0
    """standard deviation of logit(t) under logit_normal"""
    power: Annotated[float, Field(ge=0, le=1)] = 1.0
    """exponent p of the weight 1 / (error + c)^p of a sample; 0: no weighting"""
    c: PositiveFloat | None = None
    """c in this weight; null: 0.001"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.time_law == "uniform" and (given := sorted({"mu", "sigma"} & self.model_fields_set)):
            raise ValueError(f"{', '.join(given)}: no effect with time_law: uniform; remove them")
        if self.tangent == "predicted" and self.velocity == "teacher":
            raise ValueError("tangent: predicted replaces sampled velocities; use it with velocity: data or pairs")
        if self.power == 0 and self.c is not None:
            raise ValueError("c has no effect with power: 0; remove it")
        if self.omega is not None and self.velocity != "data":
            raise ValueError(f"omega has no effect with velocity: {self.velocity}; remove it, or use velocity: data")
        if self.label_dropout > self.diagonal:
            raise ValueError(f"label_dropout={self.label_dropout} must be at most diagonal={self.diagonal}")
        return self

    @property
    def student(self) -> str:
        return "flow_map"


class Recipe:
    sampler: str = "jump"
    null: Callable[[Cond], Cond]  # set by `networks`

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.teacher = config, config.guide(teacher)
        self.sampler = "renoise" if config.to_data == 1 else "jump"
        self.law = times.uniform if config.time_law == "uniform" else times.law("logit_normal", config.mu, config.sigma)

    def networks(self, init: Init) -> dict[str, Role]:
        self.null = self.config.null_of(init)
        return {"student": Trained(self.config.checked(init.flow_map()))}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        c, student = self.config, nets["student"]
        (data, noise), path = c.ends(batch, ctx.draw), student.interpolant
        one, other = (self.law(ctx.draw.uniform(name, data)) for name in ("t", "s"))
        t, (on_diagonal, _, rows) = torch.maximum(one, other), ctx.draw.split(c.diagonal, data)
        s = torch.minimum(one, other) * (ctx.draw.uniform("to_data", data) >= c.to_data)
        s = torch.where(on_diagonal, t, s)  # [B], s <= t
        x_t, v = path.mix(data, noise, t), path.velocity(data, noise, t)
        if self.teacher is not None:
            with torch.no_grad():
                v = self.teacher(x_t, t, batch.cond)
        cond = batch.cond
        if c.omega is not None:
            dropped = on_diagonal & (ctx.draw.uniform("dropped", data) * c.diagonal < c.label_dropout)
            null = self.null(batch.cond)
            v = c.own_guided(student, x_t, t, v, batch.cond, null, dropped)
            cond = drop_condition(batch.cond, null, dropped)
        target = self.target(student, x_t, t, s, v, batch, rows)
        error = distances.mse(student(x_t, t, s, cond), target)  # [B]
        weight = (error.detach() + (c.c or 1e-3)) ** -c.power
        return Loss((weight * error).mean(), {"error": error.detach().mean()})

    def target(
        self, student: nn.Module, x_t: Tensor, t: Tensor, s: Tensor, v: Tensor, batch: Batch, rows: Tensor
    ) -> Tensor:
        """The target v - (t - s) Du [B, ...], eq. (10). Du is computed for `rows` only; in the others s = t."""
        cond = {name: value[rows] for name, value in batch.cond.items()}
        x, at, to, along = x_t[rows], t[rows], s[rows], v[rows]
        direction = along
        if self.config.tangent == "predicted":
            with torch.no_grad():
                direction = student(x, at, at, cond)
        slope = self.config.slope(student, x, at, to, direction, cond)
        return v.index_put((rows,), along - like(at - to, x) * slope)
