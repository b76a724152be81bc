"""PeRFlow (Yan et al. 2024, arXiv 2405.07510): straighten the teacher's paths within each of K windows of time.

The random time t is in a window t_e < t <= t_s. z_s is real data noised to t_s, z_e is the point at t_e on the
teacher's path from z_s, and z_t is on the line between them. Minimises E w || v(z_t, t) - (z_e - z_s)/(t_e - t_s)
||^2 / d. If the loss is zero, one Euler step per window maps z_s to the same z_e as the teacher's ODE. With one window,
this is reflow.

Deviations: everything is on the linear path, where the teacher's DDIM steps are Euler steps; the authors' states are
VP. The student is a velocity field in every parameterisation. The authors predict eps in z_s = gamma z_e + kappa eps,
with gamma = (1 - t_s)/(1 - t_e), and compute z_e from it. With `parameterisation: diff_eps`,
kappa = sqrt(t_s^2 - (gamma t_e)^2), from the forward process. With ddim_eps, kappa = t_s - gamma t_e: eps is constant
within the window. For a fixed z_t, eps is affine in v: the optimum is the same as for velocity, and the weight is
w = (d eps/d v)^2. For ddim_eps it is (1 - t)^2, for diff_eps the same times a constant of the window. Both are 0 at
t = 1, where sampling starts, so the default is `velocity`, with w = 1. Conditions are dropped only with
`label_dropout`. v is discontinuous at the borders of windows, where steps start. A network that is smooth in t blurs
this, unless `times_per_window` limits training to separate times.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.core.errors import InputError
from distill.flow import distances
from distill.flow.fields import drop_condition
from distill.flow.times import uniform_grid
from distill.protocols import Batch, Cond, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn
from recipes.reflow import _segments


class Config(_segments.WindowOptions):
    """Options of reflow/perflow."""

    solver_steps: Annotated[int, Field(gt=0, le=100_000)] = 8
    """number of solver steps of the teacher in each window"""
    parameterisation: Literal["velocity", "diff_eps", "ddim_eps"] = "velocity"
    """parameterisation of the loss, which sets the weight of each time; the student is always a velocity field"""
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """probability of dropping the class label; needs classes"""
    guidance_sync: bool = False
    """true: the teacher is unguided and its class is dropped, too, so that the student can be guided later"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.times_per_window == 1 and self.parameterisation != "velocity":
            raise ValueError(
                f"times_per_window: 1 trains only at the start of each window, but {self.parameterisation} has no "
                "weight at t = 1"
            )
        if self.guidance_sync and self.guidance_scale != 1:
            raise ValueError("guidance_scale has no effect with guidance_sync: true; remove one of them")
        if self.guidance_sync and self.label_dropout == 0:
            raise ValueError(
                "guidance_sync has no effect with label_dropout: 0; remove guidance_sync, or set label_dropout above 0"
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"data", "teacher"})

    @property
    def student(self) -> str:
        return "velocity"


class Recipe:
    sampler = "euler"
    null: Callable[[Cond], Cond]  # set by `networks`

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.borders = config, uniform_grid(config.windows)
        self.teacher = None if teacher is None else teacher.guided(config.guidance_scale)

    def networks(self, init: Init) -> dict[str, Role]:
        if init.num_classes is None and self.config.label_dropout > 0:
            raise InputError("label_dropout has no effect without classes; remove it, or give labelled data")
        self.null = init.null
        return {"student": Trained(init.velocity_field())}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def t_grids(self, times: Sequence[float] | None) -> Mapping[int, Sequence[float]]:
        return _segments.grids(self.borders, self.config.times_per_window)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.data is not None
        c, cond, borders, levels = self.config, batch.cond, self.borders, self.config.times_per_window
        if c.label_dropout > 0:
            cond = drop_condition(cond, self.null(cond), ctx.draw.uniform("dropped", batch.data) < c.label_dropout)
        seen, steps = cond if c.guidance_sync else batch.cond, c.solver_steps
        t, segment = _segments.solved(
            self.teacher, batch, seen, ctx, borders=borders, levels=levels, solver=c.solver, steps=steps
        )
        v = nets["student"](segment.at(t), t, cond)
        weight = eps_slope(c.parameterisation, t, segment.t_s, segment.t_e).square()
        return Loss((weight * distances.mse(v, segment.velocity)).mean())


def eps_slope(parameterisation: str, t: Tensor, t_s: Tensor, t_e: Tensor) -> Tensor:
    """d eps/d v [B] for a fixed z_t: kappa eps = z_s - gamma z_e, z_s = z_t + (t_s - t) v, z_e = z_t - (t - t_e) v."""
    if parameterisation == "velocity":
        return torch.ones_like(t)
    gamma = (1 - t_s) / (1 - t_e)
    kappa = t_s - gamma * t_e if parameterisation == "ddim_eps" else (t_s**2 - (gamma * t_e) ** 2).sqrt()
    return (t_s - t + gamma * (t - t_e)) / kappa
