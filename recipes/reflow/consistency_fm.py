"""Consistency flow matching (Yang et al. 2024, arXiv 2407.02398): one velocity along each line, segment by segment.

Time is cut into K equal segments; f(x_t, t) = x_t - (t - e) v(x_t, t) is where x_t comes to at e, its segment's end on
the side of the data. With x_t and x_r, r = t - delta, on one line between data and noise, it minimises the mean of

    || f(x_t, t) - f-(x_r, r) ||^2 / d  +  velocity_weight || v(x_t, t) - v-(x_r, r) ||^2 / d,

f- and v- without gradients, the second term where t - e > 1.01 delta and t > boundary alone. Where r <= boundary, the
target of f is the line's own x_e. What is learnt are jumps, N = K of them; more steps in a segment follow no ODE.

Deviations: means over elements for half their sums, in both terms: velocity_weight is the paper's alpha. boundary is in
our t, 1 - theirs. t covers (0, 1], where the authors' code stops at 0.999; a border belongs to the segment below it. f-
and v- have the current weights, as in the code, not averaged ones. Under dropout the two ends see other masks. The
paper speaks of distillation without a formula: under target: teacher, x_r is the teacher's Euler step from x_t.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill.flow import distances, solvers
from distill.flow.interpolants import like
from distill.flow.times import uniform_grid
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn

NEAR = 1.01  # in deltas: no second term so near to the end of a segment


class Config(BaseModel):
    """Options of reflow/consistency_fm."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    target: Literal["data", "teacher"] = "data"
    """where x_r lies: on the line of data and noise, which needs no teacher, or a step of the teacher from x_t"""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """of the teacher, baked into the student; 1 = none"""
    segments: Annotated[int, Field(gt=0, le=100_000)] = 2
    """of time, K: the student's steps"""
    delta: Annotated[float, Field(gt=0)] = 1e-3
    """t - r; the larger, the faster it learns, and the larger its error; under precision bf16, 0.01 or more"""
    boundary: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """r up to which the target is the line's own point at the end of the segment; 0: at the data only"""
    velocity_weight: Annotated[float, Field(ge=0)] = 1e-5
    """of the difference of velocities"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.target == "data" and self.guidance_scale != 1:
            raise ValueError("guidance_scale has no effect with target: data; remove it, or use target: teacher")
        if self.target == "teacher" and self.boundary != 0:
            raise ValueError("boundary has no effect with target: teacher; remove it, or use target: data")
        if NEAR * self.delta * self.segments >= 1:
            raise ValueError(
                f"delta: {self.delta:g} is not well within a segment; valid: below {1 / NEAR / self.segments:.3g} with "
                f"segments: {self.segments}"
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
