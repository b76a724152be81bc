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
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill.flow import distances, windows
from distill.flow.times import discrete, uniform, uniform_grid, window_grids
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(BaseModel):
    """Options of reflow/proreflow."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    windows: Annotated[int, Field(gt=0, le=100_000)] = 4
    """equal windows of time in this stage, K; the student takes K steps or more"""
    times_per_window: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """train at so many times of a window, equally far apart, its start the first; 1: for K steps only; null: any"""
    solver: Literal["euler", "heun"] = "euler"
    """of the teacher, within a window"""
    teacher_steps: Annotated[int, Field(gt=0, le=100_000)] = 32
    """its steps in all windows together, a multiple of windows"""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """of the teacher, baked into the student; 1 = none"""
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
        return window_grids(self.borders, most=1 if self.config.times_per_window == 1 else 16)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.data is not None and self.teacher is not None
        c, data, noise = self.config, batch.data, ctx.draw.normal("noise", batch.data)
        u, steps = ctx.draw.uniform("t", data), c.teacher_steps // c.windows
        t = uniform(u) if c.times_per_window is None else discrete(u, c.windows * c.times_per_window)  # [B]
        with torch.no_grad():
            segment = windows.solve(
                self.teacher, data, noise, t, batch.cond, borders=self.borders, solver=c.solver, steps=steps
            )
        v = nets["student"](segment.at(t), t, batch.cond)
        square = distances.mse(v, segment.velocity).mean()
        direction = distances.direction(v, segment.velocity).mean()
        return Loss(square + c.direction_weight * direction, {"direction": direction.detach()})
