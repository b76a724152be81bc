"""2-rectified flow++ (Lee et al. 2024, arXiv 2405.20320): one round of reflow, with the losses and times that suit it.

The lines between the ends of teacher paths hardly ever cross, so x_t determines its pair, and the minimum of any
premetric is that of the square. With x_t = (1 - t) data + t noise and t of the U-shaped law, each sample has the loss

    (1 - t) PH( v(x_t, t), noise - data ) + w LPIPS( x_t - t v(x_t, t), data )

PH: pseudo-Huber; w = 1 (their configuration E) or 1/t (F). The student starts as the teacher, from an EDM or VP network
through the exact change of schedule. Inverted real data is mixed in by the spec, pairs: {backward: 0.8, forward: 0.2}.

Deviations: without lpips_trunk PH alone with weight 1, since by 1 - t nothing would train t = 1; 1/t is at most 1000,
as their t goes down to 1e-5; LPIPS is that of the package lpips, not piq's; times are independent, not mirrored. The
part of inverted data is not in their code (unverified). Their new update rule, which mixes each predicted data with the
noise it came from, is `sampler: same_noise`.
"""

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import model_validator

from distill.flow import distances, times
from distill.flow.interpolants import like
from distill.protocols import Batch, Context, Frozen, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(distances.LpipsOptions):
    """Options of reflow/rf_plus_plus."""

    lpips_resize: Literal["none", "to_64", "to_64_corners", "to_224"] = "to_224"
    """enlarge images for LPIPS to 64 or, as the authors do, 224 pixels; none: at their own size"""
    lpips_over_t: bool | None = None
    """weigh LPIPS by 1/t, configuration F; null: false, configuration E"""
    sampler: Literal["euler", "same_noise"] = "euler"
    """of the student; same_noise: the new update rule, which is Euler's in 1 and 2 steps"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if (given := self.lpips_given()) and self.lpips_trunk is None:
            raise ValueError(f"{', '.join(given)}: no effect without lpips_trunk; give it, or remove")
        if self.lpips_trunk is not None and self.lpips_path is None:
            raise ValueError("lpips_trunk needs lpips_path, the file of its weights")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher", "pairs"})

    @property
    def student(self) -> str:
        return "velocity"


class Recipe:
    sampler: str = "euler"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        if teacher is not None:
            config.check_shape(teacher.shape, "remove it")
        self.config, self.sampler = config, config.sampler

    def networks(self, init: Init) -> dict[str, Role]:
        roles: dict[str, Role] = {"student": Trained(init.velocity_field())}
        if (lpips := self.config.lpips()) is not None:
            roles["lpips"] = Frozen(lpips)
        return roles

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.pairs is not None
        data, noise = batch.pairs.data, batch.pairs.noise
        t = times.u_shaped(ctx.draw.uniform("t", data))  # [B]
        student = nets["student"]
        x_t, velocity = student.interpolant.mix(data, noise, t), student.interpolant.velocity(data, noise, t)
        v = student(x_t, t, batch.cond)
        huber = distances.pseudo_huber(v, velocity)  # [B]
        if self.config.lpips_trunk is None:
            return Loss(huber.mean())
        lpips = nets["lpips"](x_t - like(t, x_t) * v, data)
        weight = (1 / t).clamp(max=1000) if self.config.lpips_over_t else torch.ones_like(t)
        logs = {"huber": huber.mean().detach(), "lpips": lpips.mean().detach()}
        return Loss(((1 - t) * huber + weight * lpips).mean(), logs)
