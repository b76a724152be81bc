"""MeanFlow (Geng et al. 2025, arXiv 2505.13447): learn the average velocity from the identity that defines it.

The identity is u(x_t, t, s) = v - (t - s) Du, eq. (6), where Du is the derivative of u along (v, 1, 0). Its right side
is the target, without gradients; Du takes one forward-mode call. On a fixed part of the batch s = t, which is flow
matching. If v is a sample, noise - data, the identity holds only in expectation. `tangent: predicted` is improved
MeanFlow (Geng et al. 2025, arXiv 2512.02012) with the student's own velocity u(x_t, t, t): the derivative is then not
random. With `velocity: pairs`, the paths are the nearly straight ones of a rectified flow (Re-MeanFlow).

Deviations: with a teacher, v is its velocity at noised real data, as in NVIDIA's FastGen. The paper's guidance for
training on data alone (omega, kappa) is not implemented: use a guided teacher. The error is a mean over elements, so c
does not depend on their number; theirs is a sum, with c = 0.01. With dropout, the derivative and the prediction get
different masks.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from distill.flow import distances, slopes, times
from distill.flow.interpolants import like
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(slopes.SlopeOptions):
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
        return self

    @property
    def student(self) -> str:
        return "flow_map"


class Recipe:
    sampler: str = "jump"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.teacher = config, config.guide(teacher)
        self.sampler = "renoise" if config.to_data == 1 else "jump"
        self.law = times.uniform if config.time_law == "uniform" else times.law("logit_normal", config.mu, config.sigma)

    def networks(self, init: Init) -> dict[str, Role]:
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
        target = self.target(student, x_t, t, s, v, batch, rows)
        error = distances.mse(student(x_t, t, s, batch.cond), target)  # [B]
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
