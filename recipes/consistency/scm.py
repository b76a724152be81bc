"""sCM, consistency in continuous time (Lu & Song 2024, arXiv 2410.11081): the end of a path of the teacher is constant.

Along a path, f(x_t, t) = x_t - t u(x_t, t, 0) changes by -g, g = (u - v) + t Du, where Du is the derivative of u along
(v, 1, 0). The loss is |u - sg(u - g / (|g| + 0.1))|^2. During `warm_up`, the factor of Du grows from 0 to 1. `tangent:
trig` weights both parts of g as TrigFlow does; `linear` is the form of rCM (Zheng et al. 2025, arXiv 2510.08431),
without its DMD term; `clipped` is FACM (Peng et al. 2025, arXiv 2507.03738), with flow matching as an `anchor`.

Deviations: all is computed on the linear path; TrigFlow's F is a multiple of u there. |g| is a root of a mean square.
The learned variance and the weight 1/sigma are off by default: they spoil short trainings. FACM has the times of sCM.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from distill.flow import distances, levels, slopes, tangents, times
from distill.flow.interpolants import like
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(slopes.SlopeOptions):
    """Options of consistency/scm."""

    tangent: Literal["trig", "linear", "clipped"] = "trig"
    """trig: parts weighted as by TrigFlow; linear: not weighted; clipped: FACM's, each element clipped to [-1, 1]"""
    sigma_data: PositiveFloat | None = None
    """standard deviation of an element of the data, for trig; null: 0.5"""
    anchor: PositiveFloat | None = None
    """weight of flow matching by the same network at s = t, with the cosine distance added; null: none"""
    warm_up: Annotated[float, Field(ge=0, le=0.5)] | None = None
    """part of the training in which the factor of Du grows to 1, except for clipped; null: 0.1"""
    mu: float = -1.0
    """mean of logit(t), the logarithm of noise over signal"""
    sigma: PositiveFloat = 1.4
    """standard deviation of logit(t)"""
    log_variance: Literal["learned", "with_prior"] | None = None
    """divide the error by its variance at t, which is learned; with_prior: times a weight (1 - t) / t; null: do not"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        clipped = self.tangent == "clipped"
        if self.sigma_data is not None and self.tangent != "trig":
            raise ValueError(f"sigma_data has no effect with tangent: {self.tangent}; remove it, or use tangent: trig")
        if clipped and (given := [name for name in ("warm_up", "log_variance") if getattr(self, name) is not None]):
            raise ValueError(f"{', '.join(given)}: no effect with tangent: clipped; remove them, or use tangent: trig")
        if clipped and self.anchor is None:
            raise ValueError("tangent: clipped needs anchor, such as 1: without flow matching, it forgets the velocity")
        return self

    @property
    def student(self) -> str:
        return "flow_map"


class Recipe:
    sampler = "renoise"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.teacher = config, config.guide(teacher)

    def networks(self, init: Init) -> dict[str, Role]:
        student = Trained(self.config.checked(init.flow_map(to_data=self.config.anchor is None)))
        learned = self.config.log_variance is not None
        return {"student": student, **({"log_variance": Trained(tangents.LogVariance())} if learned else {})}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)
        if self.config.log_variance is not None:
            yield Turn("log_variance", self.variance_loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        c, student = self.config, nets["student"]
        data, noise = c.ends(batch, ctx.draw)
        t = times.logit_normal(ctx.draw.uniform("t", data), c.mu, c.sigma).clamp(levels.FIRST, levels.LAST)  # [B]
        x_t, v = student.interpolant.mix(data, noise, t), student.interpolant.velocity(data, noise, t)
        if self.teacher is not None:
            with torch.no_grad():
                v = self.teacher(x_t, t, batch.cond)
        end, u = torch.zeros_like(t), student(x_t, t, torch.zeros_like(t), batch.cond)
        du = c.slope(student, x_t, t, end, v, batch.cond)
        step, slope = self.step(u.detach(), v, du, t, ctx.progress)
        error = distances.mse(u, u.detach() - step) * slope.square()  # [B], its gradient is that of the tangent
        weight = torch.ones_like(t)
        if c.tangent == "clipped":
            weight = ((1 - t) * (math.pi / 2)).cos() / (error.detach() + 1e-3).sqrt()
        if c.log_variance is not None:
            prior = (1 - t) / t if c.log_variance == "with_prior" else weight
            weight = prior * (-nets["log_variance"](t)).exp()
            ctx.carry.update(t=t, error=prior * error.detach())
        total = (weight * error).mean()
        if c.anchor is not None:
            on_path = student(x_t, t, t, batch.cond)
            apart = 1 - nn.functional.cosine_similarity(on_path.flatten(1), v.flatten(1))
            total = total + c.anchor * (distances.mse(on_path, v) + apart).mean()
        return Loss(total, {"tangent": (step * like(slope, step)).square().mean().detach()})

    def step(self, u: Tensor, v: Tensor, du: Tensor, t: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """What the loss subtracts from u [B, ...], and the factor [B] of u in the error."""
        c, warm_up = self.config, 0.1 if self.config.warm_up is None else self.config.warm_up
        factor = 1.0 if progress >= warm_up else progress / warm_up
        if c.tangent == "trig":
            return tangents.trig(u, v, du, t, factor, c.sigma_data or 0.5)
        one = torch.ones_like(t)
        return (tangents.linear(u, v, du, t, factor) if c.tangent == "linear" else tangents.clipped(u, v, du, t)), one

    def variance_loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        found = nets["log_variance"](ctx.carry["t"])
        return Loss(((-found).exp() * ctx.carry["error"] + found).mean())
