"""ProReflow (Ke et al. 2025, arXiv 2503.04824): PeRFlow's windows, fewer from stage to stage, with aligned velocities.

Minimises E || v - v* ||^2 / d + alpha (1 - cos(v, v*)), v = v(z_t, t) and v* = (z_e - z_s)/(t_e - t_s) the velocity of
the teacher's path across the window of t, from real data noised to its start, as in reflow/perflow. A wrong direction
costs more than a wrong length.

The progression is a chain of train stages, e.g. of `windows: 8`, then 4, then 2, each with `init:` the one before and
the same teacher. The cheap way is to make the one before the teacher too (`teacher:`), with its windows as
`teacher_steps`: at its optimum its steps are the teacher's map, so the targets are the same, but its errors add up.

Deviations: of the linear path. The form of the sum, alpha and the windows of the stages are unverified.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from distill.flow import distances
from distill.flow.times import uniform_grid
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn
from recipes.reflow import _segments


class Config(_segments.WindowOptions):
    """Options of reflow/proreflow."""

    teacher_steps: Annotated[int, Field(gt=0, le=100_000)] = 32
    """its steps in all windows together, a multiple of windows"""
    direction_weight: Annotated[float, Field(ge=0)] = 0.1
    """alpha, of 1 - cos beside the mean square error; 0: reflow/perflow"""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        k, steps = self.windows, self.teacher_steps
        if steps % k:
            raise ValueError(f"teacher_steps: {steps} is not a multiple of windows: {k}; nearest: {-(-steps // k) * k}")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"data", "teacher"})

    @property
    def student(self) -> str:
        return "velocity"


class Recipe:
    sampler = "euler"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.borders = config, uniform_grid(config.windows)
        self.teacher = None if teacher is None else teacher.guided(config.guidance_scale)

    def networks(self, init: Init) -> dict[str, Role]:
        return {"student": Trained(init.velocity_field())}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def t_grids(self, times: Sequence[float] | None) -> Mapping[int, Sequence[float]]:
        return _segments.grids(self.borders, self.config.times_per_window)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        c, cond, borders, levels = self.config, batch.cond, self.borders, self.config.times_per_window
        steps = c.teacher_steps // c.windows
        t, segment = _segments.solved(
            self.teacher, batch, cond, ctx, borders=borders, levels=levels, solver=c.solver, steps=steps
        )
        v = nets["student"](segment.at(t), t, cond)
        square = distances.mse(v, segment.velocity).mean()
        direction = distances.direction(v, segment.velocity).mean()
        return Loss(square + c.direction_weight * direction, {"direction": direction.detach()})
