"""Consistency models (Song et al. 2023, arXiv 2303.01469): map every point of a path to its clean end.

f(x_t, t) = x_t - t u(x_t, t, 0) is trained to equal its value at s < t: D( f(x_t, t), f-(x_s, s) ) / (t - s); f- has no
gradient. x_s is the teacher's step from x_t (distillation, alg. 2) or has the same data and noise (training, alg. 3). t
and s are neighbours on a grid, or approach each other (Easy Consistency Tuning, Geng et al. 2024, arXiv 2406.14548).

Deviations: the path is linear, t = 1 is noise. The grid is uniform in t (EDM's in the paper). Weight and pseudo-Huber
distance are from iCT (Song & Dhariwal 2023, arXiv 2310.14189), with t - s in place of the difference of noise levels.
With dropout, x_t and x_s get different masks. Tuning uses its paper's t and s; t is clamped to [0.002, 0.9999].
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch import Tensor

from distill.flow import distances, solvers, times
from distill.flow.fields import jump_to_data
from distill.flow.interpolants import like
from distill.protocols import Batch, Context, Copy, Init, Loss, Nets, Role, Teacher, Trained, Turn

FIRST, LAST = 0.002, 0.9999  # sigma 0.002, EDM's smallest, and 9999; at t = 0 and t = 1, s would be equal to t


class Config(BaseModel):
    """Options of consistency/consistency."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    point: Literal["heun", "euler", "data"] = "heun"
    """how x_s is made: heun or euler: by this step of the teacher; data: from the same data and noise, no teacher"""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """guidance scale of the teacher, which the student learns; 1: no guidance"""
    times: Literal["grid", "continuous"] = "grid"
    """grid: t and s are neighbours on a grid; continuous: Easy Consistency Tuning"""
    levels: Annotated[int, Field(gt=0, le=100_000)] = 18
    """number of steps of the grid, at the start of training"""
    mu: float = -1.1
    """mean of logit(t) under continuous"""
    sigma: PositiveFloat = 2.0
    """standard deviation of logit(t) under continuous"""
    halving_images: Annotated[int, Field(gt=0, le=10**13)] | None = None
    """t - s is halved after every so many images, up to ten times (with bf16, plan for at most three); null: never"""
    target_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """decay per step of the EMA that makes the target; null: the student itself makes it"""
    distance: Literal["l2", "pseudo_huber", "pseudo_huber_elementwise"] = "pseudo_huber"
    """distance D between the two predictions of data"""
    huber_c: PositiveFloat | None = None
    """c of the pseudo-Huber distances; null: 0.00054 sqrt(d)"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        unused = {"levels"} if self.times == "continuous" else {"mu", "sigma"}
        if given := sorted(unused & self.model_fields_set):
            raise ValueError(f"{', '.join(given)}: no effect with times: {self.times}; remove them")
        if self.times == "continuous" and self.halving_images is None:
            raise ValueError("times: continuous needs halving_images; without it, s stays 0 for most samples")
        if self.point == "data" and self.guidance_scale != 1:
            raise ValueError("guidance_scale has no effect with point: data; remove it, or use heun or euler")
        if self.distance == "l2" and self.huber_c is not None:
            raise ValueError("huber_c has no effect with distance: l2; remove it, or use a pseudo-Huber distance")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"data"} if self.point == "data" else {"data", "teacher"})

    @property
    def student(self) -> str:
        return "flow_map"


class Recipe:
    sampler = "renoise"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config = config
        self.teacher = None if teacher is None or config.point == "data" else teacher.guided(config.guidance_scale)

    def networks(self, init: Init) -> dict[str, Role]:
        decay, student = self.config.target_decay, Trained(init.flow_map(to_data=True))
        return {"student": student} if decay is None else {"student": student, "target": Copy("student", decay)}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.data is not None
        data, noise, student = batch.data, ctx.draw.normal("noise", batch.data), nets["student"]
        t, s, gap = self.neighbours(ctx.draw.uniform("t", data), ctx.images)  # [B], 0 <= s < t <= 1
        x_t, x_s = (student.interpolant.mix(data, noise, time) for time in (t, s))
        with torch.no_grad():
            if self.teacher is not None and self.config.point != "data":
                stepped = solvers.step(self.teacher, x_t, t, s, batch.cond, self.config.point)
                is_data = (s == 0) & (self.config.times == "continuous")
                x_s = torch.where(like(is_data, x_s), x_s, stepped)
            target = jump_to_data(nets.get("target", student), x_s, s, batch.cond)
        return Loss((self.distance(jump_to_data(student, x_t, t, batch.cond), target) / gap).mean())

    def neighbours(self, u: Tensor, images: int) -> tuple[Tensor, Tensor, Tensor]:
        """t, s and t - s [B] from uniform draws u [B]."""
        c, halvings = self.config, min(images // (self.config.halving_images or images + 1), 10)
        if c.times == "continuous":
            t = times.logit_normal(u, c.mu, c.sigma).clamp(FIRST, LAST)
            return t, *times.nearer(t, 0.5 ** (halvings + 1))
        levels = c.levels * 2**halvings
        t = (u * levels).floor() + 1  # 1 ... levels
        return t / levels, (t - 1) / levels, torch.full_like(t, 1 / levels)

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.config.distance == "l2":
            return distances.mse(prediction, target)
        d = target[0].numel()
        c = self.config.huber_c or 0.00054 * math.sqrt(d)
        if self.config.distance == "pseudo_huber_elementwise":
            return distances.pseudo_huber_elementwise(prediction, target, c)
        return distances.pseudo_huber(prediction, target, scale=c / d)
