"""Consistency models (Song et al. 2023, arXiv 2303.01469): map every point of a path to its clean end.

f(x_t, t) = x_t - t u(x_t, t, 0) is trained to equal its value at s < t: D( f(x_t, t), f-(x_s, s) ) / (t - s); f- has no
gradient. x_s is the teacher's step from x_t (distillation, alg. 2) or has the same data and noise (training, alg. 3). t
and s are neighbours on a grid, which becomes finer during training with `curriculum` (CT; iCT, Song & Dhariwal 2023,
arXiv 2310.14189), or approach each other (Easy Consistency Tuning, Geng et al. 2024, arXiv 2406.14548).

Deviations: the path is linear, t = 1 is noise, and by default the grid is uniform in t. The weight is that of iCT, with
t - s in place of the difference of noise levels, also for CT. The ends of EDM's grid are at t = 0 and 1. With dropout,
x_t and x_s get different masks. Tuning uses its paper's t and s; t is clamped to [0.002, 0.9999].
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from distill.flow import distances, levels, solvers
from distill.flow.fields import jump_to_data
from distill.flow.guidance_options import GuidanceScale
from distill.flow.interpolants import like
from distill.protocols import Batch, Context, Copy, Frozen, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(levels.LevelOptions, distances.LpipsOptions):
    """Options of consistency/consistency."""

    point: Literal["heun", "euler", "data"] = "heun"
    """how x_s is made: heun or euler: by this step of the teacher; data: from the same data and noise, no teacher"""
    guidance_scale: GuidanceScale = 1.0
    """guidance scale of the teacher, which the student learns; 1: no guidance; [low, high]: it is an input"""
    target_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """decay per step of the EMA that makes the target; grows with curriculum: ct; null: the student itself makes it"""
    distance: Literal["l2", "pseudo_huber", "pseudo_huber_elementwise", "lpips"] = "pseudo_huber"
    """distance D between the two predictions of data"""
    huber_c: PositiveFloat | None = None
    """c of the pseudo-Huber distances; null: 0.00054 sqrt(d)"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.point == "data" and self.guidance_scale != 1:
            raise ValueError("guidance_scale has no effect with point: data; remove it, or use heun or euler")
        if self.huber_c is not None and "huber" not in self.distance:
            raise ValueError(f"huber_c has no effect with distance: {self.distance}; remove it, or use pseudo_huber")
        if (given := self.lpips_given()) and self.distance != "lpips":
            raise ValueError(f"{', '.join(given)}: no effect with distance: {self.distance}; remove them, or use lpips")
        if self.distance == "lpips" and (self.lpips_trunk is None or self.lpips_path is None):
            raise ValueError("distance: lpips needs lpips_trunk and lpips_path")
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
        self.codec = config.codec_of(teacher, "use another distance")
        self.config = config
        self.teacher = None if teacher is None or config.point == "data" else teacher.guided(config.guidance_scale)

    def networks(self, init: Init) -> dict[str, Role]:
        roles: dict[str, Role] = {"student": Trained(init.flow_map(to_data=True))}
        if self.config.target_decay is not None:
            roles["target"] = Copy(
                "student", self.decay if self.config.curriculum == "ct" else self.config.target_decay
            )
        if (lpips := self.config.lpips(self.codec)) is not None:
            roles["lpips"] = Frozen(lpips)
        return roles

    def decay(self, progress: float) -> float:
        """The decay of the target in CT: exp(s0 ln(mu0) / (N - 1)), where N - 1 is the number of steps of the grid."""
        c = self.config
        return float((c.target_decay or 0) ** ((c.levels + 1) / c.steps(0, progress)))

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.data is not None
        data, noise, student = batch.data, ctx.draw.normal("noise", batch.data), nets["student"]
        t, s, gap = self.config.neighbours(ctx.draw.uniform("t", data), ctx.images, ctx.progress)  # [B], s < t
        x_t, x_s = (student.interpolant.mix(data, noise, time) for time in (t, s))
        with torch.no_grad():
            if self.teacher is not None and self.config.point != "data":
                stepped = solvers.step(self.teacher, x_t, t, s, batch.cond, self.config.point)
                is_data = (s == 0) & (self.config.times == "continuous")
                x_s = torch.where(like(is_data, x_s), x_s, stepped)
            target = jump_to_data(nets.get("target", student), x_s, s, batch.cond)
        prediction = jump_to_data(student, x_t, t, batch.cond)
        apart = nets["lpips"](prediction, target) if "lpips" in nets else self.distance(prediction, target)
        return Loss((apart / gap).mean())

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.config.distance == "l2":
            return distances.mse(prediction, target)
        d = target[0].numel()
        c = self.config.huber_c or 0.00054 * math.sqrt(d)
        if self.config.distance == "pseudo_huber_elementwise":
            return distances.pseudo_huber_elementwise(prediction, target, c)
        return distances.pseudo_huber(prediction, target, scale=c / d)
