"""Flow map matching (Boffi et al. 2024, arXiv 2406.07507, and 2025, 2505.18825): one of the three laws of a flow map.

With X = x_t + (s - t) u(x_t, t, s), a flow map satisfies each of these, and each can be learned:
    lagrangian:   u = v(X, s) + (t - s) du/ds         X moves with the velocity v of the place where it lands
    eulerian:     u = v(x_t, t) - (t - s) Du          as in meanflow; Du is the derivative along (v, 1, 0)
    progressive:  u = r u(x_t, t, m) + (1 - r) u(x_m, m, s)         two jumps, via m = t - r (t - s)
v is the teacher's, or (`velocity: self`) u at s = t, which a part of the batch learns from data: LSD, ESD and PSD. With
`gradient: full`, gradients also flow through the derivative, as in terminal velocity matching (TVM, Zhou et al. 2025,
arXiv 2511.19797; it is lagrangian with self); with `normalise`, the right side minus u is divided by its length, as in
Align Your Flow (Sabour et al. 2025, arXiv 2506.14603), in which v is a guided teacher's. Deviations: the length is the
root of a mean square. Gradients through v at the landing point are left out. r is 1/2 or uniform; with uniform r and
data it is SplitMeanFlow (Guo et al. 2025, arXiv 2507.16884).
"""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from distill.flow import distances, laws, tangents, times
from distill.flow.guidance_options import GuidanceScale
from distill.flow.interpolants import like
from distill.protocols import Batch, Context, Copy, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(BaseModel):
    """Options of shortcut/flow_map."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    law: Literal["lagrangian", "eulerian", "progressive"] = "lagrangian"
    """which law of flow maps is learned"""
    velocity: Literal["teacher", "self"] = "teacher"
    """velocity v: the teacher's, or that of the student itself, which it learns from data"""
    guidance_scale: GuidanceScale = 1.0
    """guidance scale of the teacher, which the student learns; 1: no guidance; [low, high]: it is an input"""
    gradient: Literal["semi", "full"] = "semi"
    """semi: the right side has no gradient; full: its derivative has, which needs twice the memory"""
    normalise: bool = False
    """divide the right side minus u by its length"""
    middle: Literal["half", "uniform"] | None = None
    """where the two jumps of the progressive law meet; null: half"""
    target_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """decay per step of the EMA of the student that is v, or that makes the two jumps; null: the student itself"""
    diagonal: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """fraction of the batch with s = t, where u is the velocity"""
    to_data: Annotated[float, Field(ge=0, le=1)] = 0.25
    """fraction of the other samples with s = 0, as in sampling with one step; 1: sampling adds fresh noise"""
    mu: float = -0.8
    """mean of logit(t - s); s is uniform on the rest"""
    sigma: PositiveFloat = 1.0
    """standard deviation of logit(t - s)"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        own = self.velocity == "self" or self.law == "progressive"
        for wrong, message in (
            (self.velocity == "self" and self.guidance_scale != 1, "guidance_scale has no effect with velocity: self"),
            (self.law == "progressive" and self.gradient == "full", "gradient: full has no effect on law: progressive"),
            (self.normalise and self.gradient == "full", "normalise has no effect with gradient: full"),
            (self.middle is not None and self.law != "progressive", f"middle has no effect on law: {self.law}"),
            (self.target_decay is not None and not own, "target_decay has no effect with velocity: teacher"),
        ):
            if wrong:
                raise ValueError(f"{message}; remove it")
        return self

    @property
    def needs(self) -> frozenset[str]:
        needs = {"data"} | ({"teacher"} if self.velocity == "teacher" else set())
        return frozenset(needs | ({"jvp"} if self.law != "progressive" else set()))

    @property
    def student(self) -> str:
        return "flow_map"


class Recipe:
    sampler: str = "jump"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.sampler = "renoise" if config.to_data == 1 else "jump"
        guided = config.velocity == "teacher" and teacher is not None
        self.config, self.teacher = config, teacher.guided(config.guidance_scale) if teacher and guided else None

    def networks(self, init: Init) -> dict[str, Role]:
        decay, student = self.config.target_decay, Trained(init.flow_map())
        return {"student": student} if decay is None else {"student": student, "target": Copy("student", decay)}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.data is not None
        c, data, student = self.config, batch.data, nets["student"]
        noise, (on_diagonal, _, rows) = ctx.draw.normal("noise", data), ctx.draw.split(c.diagonal, data)
        gap, rest, jump = (ctx.draw.uniform(name, data) for name in ("gap", "s", "to_data"))
        gap = times.logit_normal(gap, c.mu, c.sigma)
        t = (rest * (1 - gap) + gap).clamp(max=1)
        s = torch.where(on_diagonal, t, rest * (1 - gap) * (jump >= c.to_data))  # [B]
        x_t, v = student.interpolant.mix(data, noise, t), student.interpolant.velocity(data, noise, t)
        if self.teacher is not None:
            with torch.no_grad():
                v = self.teacher(x_t, t, batch.cond)
        own, cond = nets.get("target", student), {name: value[rows] for name, value in batch.cond.items()}
        at = x_t[rows], t[rows], s[rows], cond
        if c.law == "progressive":
            r = torch.full_like(t, 0.5) if c.middle != "uniform" else ctx.draw.uniform("middle", data).clamp(0.01, 0.99)
            right = laws.progressive(own, *at, r[rows])
        else:
            velocity = self.teacher or (lambda x, t, cond: own(x, t, t, cond))
            law = laws.lagrangian if c.law == "lagrangian" else laws.eulerian
            right = law(student, *at, velocity, gradient=c.gradient == "full")
        target = torch.where(like(on_diagonal, v), v, v.index_put((rows,), right.to(v.dtype)))
        u = student(x_t, t, s, batch.cond)
        if c.normalise:
            target = u.detach() + tangents.normalised(target - u.detach())
        error = distances.mse(u, target)  # [B]
        return Loss(error.mean(), {"on_diagonal": (error * on_diagonal).detach().mean() / c.diagonal})
