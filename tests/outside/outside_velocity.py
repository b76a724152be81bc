"""Velocity distillation, after flow matching (Lipman et al. 2022, arXiv 2210.02747): a teacher's, learnt anew.

A recipe of somebody else's package, as small as they get.
"""

from collections.abc import Iterator

import torch
from pydantic import BaseModel, ConfigDict

from distill.flow import distances
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(BaseModel):
    """Options of outside/velocity."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    latest: float = 1.0
    """time up to which the velocity is learnt"""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"data", "teacher"})

    @property
    def student(self) -> str:
        return "velocity"


class Recipe:
    sampler = "euler"

    def __init__(self, config: Config, teacher: Teacher) -> None:
        self.config, self.teacher = config, teacher

    def networks(self, init: Init) -> dict[str, Role]:
        return {"student": Trained(init.velocity_field())}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        noise, t = ctx.draw.normal("noise", batch.data), self.config.latest * ctx.draw.uniform("t", batch.data)
        x_t = nets["student"].interpolant.mix(batch.data, noise, t)
        with torch.no_grad():
            v = self.teacher.field(x_t, t, batch.cond)
        return Loss(distances.mse(nets["student"](x_t, t, batch.cond), v).mean())
