"""ProReflow (Ke et al. 2025, arXiv 2503.04824): PeRFlow with fewer windows in each stage, and a loss on directions.

Minimises E || v - v* ||^2 / d + alpha (1 - cos(v, v*)) with v = v(z_t, t). As in reflow/perflow, the target
v* = (z_e - z_s)/(t_e - t_s) is the mean velocity of the teacher's path across the window that contains t, from real
data noised to the start of the window. The second term, a loss on the direction of velocities, makes a wrong direction
cost more than a wrong length.

To decrease the number of windows, use several train stages, e.g. with `windows: 8`, then 4, then 2. Each has the
previous stage as its `init:`, and all have the same teacher. It is cheaper to use the previous stage as the teacher,
too (`teacher:`), with `teacher_steps` equal to its windows. At its optimum, the targets are the same, but in practice
errors add up.

Deviations: everything is on the linear path. The form of the loss, alpha and the numbers of windows are unverified.
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
    """total number of solver steps of the teacher over all windows; must be a multiple of windows"""
    direction_weight: Annotated[float, Field(ge=0)] = 0.1
    """weight of 1 - cos in the loss, alpha; 0: only the mean square error, as in reflow/perflow"""

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
