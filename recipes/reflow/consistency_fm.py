"""Consistency flow matching (Yang et al. 2024, arXiv 2407.02398): constant velocity along each line, by segments.

Time is divided into K equal segments. f(x_t, t) = x_t - (t - e) v(x_t, t) is the predicted point at time e, the end of
the segment on the side of the data. If x_t and x_r, r = t - delta, are on one line between data and noise, the loss is

    || f(x_t, t) - f-(x_r, r) ||^2 / d  +  velocity_weight || v(x_t, t) - v-(x_r, r) ||^2 / d,

where f- and v- have no gradients. The second term is used only if t - e > 1.01 delta and t > boundary. If
r <= boundary, the target of f is x_e, the point of the line at time e. The student learns one jump per segment, so it
is made for K steps; up to four steps per segment are possible, but do not follow an ODE.

Deviations: both terms are means over elements; the authors use half of the sums, so velocity_weight is the paper's
alpha. boundary is in our t, which is 1 - theirs. t is in (0, 1]; the authors' code stops at 0.999. A border between two
segments belongs to the one at smaller times. f- and v- use the current weights, as in the authors' code, not averages.
With dropout, x_t and x_r get different masks. The paper mentions distillation without a formula: here, with
`target: teacher`, x_r is the end of the teacher's Euler step from x_t.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill.flow import distances, solvers
from distill.flow.guidance_options import GuidanceScale
from distill.flow.interpolants import like
from distill.flow.times import uniform_grid
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn

NEAR = 1.01  # in units of delta: no second term closer than this to the end of a segment


class Config(BaseModel):
    """Options of reflow/consistency_fm."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    target: Literal["data", "teacher"] = "data"
    """how x_r is made: data: on the line between data and noise, no teacher; teacher: by its Euler step from x_t"""
    guidance_scale: GuidanceScale = 1.0
    """guidance scale of the teacher, which the student learns; 1: no guidance; [low, high]: it is an input"""
    segments: Annotated[int, Field(gt=0, le=100_000)] = 2
    """number of equal segments of time, K; the student takes one to four steps in each"""
    delta: Annotated[float, Field(gt=0)] = 1e-3
    """t - r; with a larger value training is faster, but the error is larger; for bf16, use 0.01 or more"""
    boundary: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """for r up to this value, the target is the point of the line at the segment's end; 0: only at r = 0"""
    velocity_weight: Annotated[float, Field(ge=0)] = 1e-5
    """weight of the velocity term in the loss"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.target == "data" and self.guidance_scale != 1:
            raise ValueError("guidance_scale has no effect with target: data; remove it, or use target: teacher")
        if self.target == "teacher" and self.boundary != 0:
            raise ValueError("boundary has no effect with target: teacher; remove it, or use target: data")
        if NEAR * self.delta * self.segments >= 1:
            raise ValueError(
                f"delta: {self.delta:g} is too large for the length of a segment; valid: below "
                f"{1 / NEAR / self.segments:.3g} with segments: {self.segments}"
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"data"} if self.target == "data" else {"data", "teacher"})

    @property
    def student(self) -> str:
        return "velocity"


class Recipe:
    sampler = "euler"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config = config
        self.teacher = None if teacher is None or config.target == "data" else teacher.guided(config.guidance_scale)

    def networks(self, init: Init) -> dict[str, Role]:
        return {"student": Trained(init.velocity_field())}

    def t_grids(self, times: Sequence[float] | None) -> Mapping[int, Sequence[float]]:
        """One to four steps in each segment."""
        return {n: uniform_grid(n).tolist() for n in (steps * self.config.segments for steps in range(1, 5))}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.data is not None
        c, data, noise, student = self.config, batch.data, ctx.draw.normal("noise", batch.data), nets["student"]
        t = 1 - ctx.draw.uniform("t", data)  # [B], in (0, 1]
        r, end = (t - c.delta).clamp(min=0), ((t * c.segments).ceil() - 1) / c.segments
        x_t, x_r, x_end = (student.interpolant.mix(data, noise, time) for time in (t, r, end))
        v_t = student(x_t, t, batch.cond)
        with torch.no_grad():
            if self.teacher is not None:
                x_r = solvers.step(self.teacher, x_t, t, r, batch.cond, "euler")
            v_r = student(x_r, r, batch.cond)
            target = x_r - like(r - end, x_r) * v_r
            if self.teacher is None:
                target = torch.where(like(r <= c.boundary, x_r), x_end, target)
        jump = distances.mse(x_t - like(t - end, x_t) * v_t, target)
        bend = distances.mse(v_t, v_r) * ((t - end > NEAR * c.delta) & (t > c.boundary))
        return Loss((jump + c.velocity_weight * bend).mean())
