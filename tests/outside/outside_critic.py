"""Adversarial one-step distillation on a teacher's features, after Sauer et al. 2023, arXiv 2311.17042.

A head on the features of the frozen teacher tells the ends of its paths from the student's samples.
"""

from collections.abc import Iterator

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from distill.flow import distances
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(BaseModel):
    """Options of outside/critic."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    weight: float = 0.05
    """of the adversarial loss, beside the distance to the end of the path"""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"pairs", "teacher"})

    @property
    def student(self) -> str:
        return "velocity"


class Recipe:
    sampler = "euler"

    def __init__(self, config: Config, teacher: Teacher) -> None:
        self.config, self.teacher = config, teacher

    def networks(self, init: Init) -> dict[str, Role]:
        width = self.teacher.shape[0] * len(self.teacher.layers)
        head = nn.Sequential(nn.Linear(width, 32), nn.SiLU(), nn.Linear(32, 1))
        return {"student": Trained(init.velocity_field()), "head": Trained(head)}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("head", self.judging)
        yield Turn("student", self.fooling)

    def logit(self, nets: Nets, data: Tensor, batch: Batch, ctx: Context) -> Tensor:
        noise, t = ctx.draw.normal("judged", data), 0.1 + 0.8 * ctx.draw.uniform("level", data)
        x_t = (1 - t[:, None]) * data + t[:, None] * noise
        found = self.teacher.features(x_t, t, batch.cond, self.teacher.layers)
        return nets["head"](torch.cat([each.float() for each in found], dim=1)).squeeze(1)

    def sample(self, nets: Nets, batch: Batch) -> Tensor:
        noise = batch.pairs.noise
        return noise - nets["student"](noise, torch.ones(len(noise), device=noise.device), batch.cond)

    def judging(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        with torch.no_grad():
            fake = self.sample(nets, batch)
        real, false = (self.logit(nets, each, batch, ctx) for each in (batch.pairs.data, fake))
        return Loss(nn.functional.softplus(-real).mean() + nn.functional.softplus(false).mean())

    def fooling(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        fake = self.sample(nets, batch)
        near = distances.mse(fake, batch.pairs.data).mean()
        return Loss(near + self.config.weight * nn.functional.softplus(-self.logit(nets, fake, batch, ctx)).mean())
