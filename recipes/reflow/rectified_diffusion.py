"""Rectified Diffusion (Wang et al. 2024, arXiv 2410.07303): retrain on the teacher's pairs, with data prediction.

For one step, the path need not be straight, but eps must be constant along it: then DDIM is exact. Minimises E PHe(
x_t + (t_e - t) v(x_t, t) - x_e ), the elementwise pseudo-Huber distance between the predicted and the true end of a
path. With `form: full`, paths go from the noise to the data of pairs. With `form: phased`, time is divided into K
phases; in each, a path goes from real data, noised to the start of the phase, to the end of the teacher's steps, which
are made during training.

Deviations: everything is on the linear path. In the coordinates x/(alpha + sigma), t = sigma/(alpha + sigma), the DDIM
line of every schedule is a straight line, and predictions of eps, data or v have the same optimum. So the student is a
velocity field. The error of the end is t - t_e times that of the velocity, so with `distance: l2`, a velocity error has
the weight (t - t_e)^2. t is uniform in linear time; the authors' t is uniform in the index of a VP schedule. Conditions
are never dropped: students are not guided here. For the authors' third stage, use consistency/consistency.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch import Tensor

from distill.flow import distances
from distill.flow.guidance_options import GuidanceScale
from distill.flow.interpolants import like
from distill.flow.times import uniform, uniform_grid
from distill.flow.windows import Segment
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn
from recipes.reflow import _segments


class Config(BaseModel):
    """Options of reflow/rectified_diffusion."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    form: Literal["full", "phased"] = "full"
    """full: train on pairs; phased: on windows of time (phases), from data and the teacher"""
    phases: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """for phased: number of equal windows of time, K; the student takes K steps or more; null: 4"""
    solver_steps: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """for phased: Euler steps of the teacher in each phase; null: 10"""
    times: Literal["uniform", "grid"] = "uniform"
    """training times; grid (for phased): only the times of the teacher's steps"""
    guidance_scale: GuidanceScale = 1.0
    """for phased: guidance scale of the teacher, which the student learns; 1: no guidance; [low, high]: an input"""
    distance: Literal["pseudo_huber_elementwise", "l2"] = "pseudo_huber_elementwise"
    """distance between predicted and true end, per sample"""
    huber_c: PositiveFloat | None = None
    """c of the pseudo-Huber distance; null: 0.001"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        phased = {"phases", "solver_steps", "times", "guidance_scale"} & self.model_fields_set
        if self.form == "full" and phased:
            raise ValueError(f"{', '.join(sorted(phased))}: no effect with form: full; remove them, or use phased")
        if self.distance == "l2" and self.huber_c is not None:
            raise ValueError("huber_c has no effect with distance: l2; remove it, or use pseudo_huber_elementwise")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher", "pairs"} if self.form == "full" else {"teacher", "data"})

    @property
    def student(self) -> str:
        return "velocity"


class Recipe:
    sampler = "euler"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.steps = config, config.solver_steps or 10
        self.borders = uniform_grid(1 if config.form == "full" else config.phases or 4)
        self.teacher = None if teacher is None or config.form == "full" else teacher.guided(config.guidance_scale)

    def networks(self, init: Init) -> dict[str, Role]:
        return {"student": Trained(init.velocity_field())}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def t_grids(self, times: Sequence[float] | None) -> Mapping[int, Sequence[float]]:
        return {} if self.config.form == "full" else _segments.grids(self.borders, None)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        t, segment = self.across(batch, ctx)
        x_t = segment.at(t)
        end = x_t + like(segment.t_e - t, x_t) * nets["student"](x_t, t, batch.cond)
        return Loss(self.distance(end, segment.end).mean())

    def across(self, batch: Batch, ctx: Context) -> tuple[Tensor, Segment]:
        """Times t [B], and for each the segment of the teacher's path in its phase (full: the whole path)."""
        if self.config.form == "full":
            assert batch.pairs is not None
            t = uniform(ctx.draw.uniform("t", batch.pairs.data))
            return t, Segment(batch.pairs.noise, batch.pairs.data, torch.ones_like(t), torch.zeros_like(t))
        levels, borders, steps = None if self.config.times == "uniform" else self.steps, self.borders, self.steps
        return _segments.solved(
            self.teacher, batch, batch.cond, ctx, borders=borders, levels=levels, solver="euler", steps=steps
        )

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.config.distance == "l2":
            return distances.mse(prediction, target)
        return distances.pseudo_huber_elementwise(prediction, target, self.config.huber_c or 1e-3)
