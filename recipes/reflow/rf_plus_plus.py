"""2-rectified flow++ (Lee et al. 2024, arXiv 2405.20320): one round of reflow, with better losses and training times.

The lines between the ends of teacher paths almost never cross, so x_t determines its pair. Then every loss that is zero
only at the target has the same minimum, and losses other than the squared error can be used. With x_t = (1 - t)
data + t noise and t from a U-shaped distribution, the loss of a sample is

    (1 - t) PH( v(x_t, t), noise - data ) + w LPIPS( x_t - t v(x_t, t), data )

where PH is the pseudo-Huber distance, and w is 1 (configuration E of the paper) or 1/t (configuration F). The student
starts from the teacher; a network of an EDM or VP schedule is converted exactly to the linear path. To add pairs of
real data and the noise to which it is inverted, set `pairs: {backward: 0.8, forward: 0.2}` in the spec. With
`sampler: same_noise`, sampling uses the paper's new update rule, which mixes each prediction of the data with the
initial noise of the path.

Deviations: without lpips_trunk, the loss is PH with weight 1, because with weight 1 - t, nothing would be learnt at
t = 1. 1/t is limited to 1000; the authors' t goes down to 1e-5. LPIPS is from the package lpips; the authors use piq.
Times are independent; the authors draw them in mirrored pairs. The fraction of inverted data is not in their code
(unverified).
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
    """enlarge images for LPIPS to 64 pixels or, as the authors do, to 224; none: do not enlarge"""
    lpips_over_t: bool | None = None
    """weight of LPIPS: 1/t (true, configuration F) or 1 (false, configuration E); null: false"""
    sampler: Literal["euler", "same_noise"] = "euler"
    """sampler of the student; same_noise: the paper's new update rule, equal to euler for 1 and 2 steps"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if (given := self.lpips_given()) and self.lpips_trunk is None:
            raise ValueError(f"{', '.join(given)}: no effect without lpips_trunk; give it, or remove them")
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
        self.codec = config.codec_of(teacher, "remove it")
        self.config, self.sampler = config, config.sampler

    def networks(self, init: Init) -> dict[str, Role]:
        roles: dict[str, Role] = {"student": Trained(init.velocity_field())}
        if (lpips := self.config.lpips(self.codec)) is not None:
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
