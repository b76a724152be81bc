"""Reflow (Liu et al. 2022, arXiv 2209.03003) with low-rank adapters, kept near their slow copy: a recipe for tests."""

from pydantic import BaseModel, ConfigDict

from distill.flow import distances
from distill.protocols import Adapter, Copy, Loss, Turn


class Config(BaseModel):
    """Options of ./adapted.py."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rank: int = 2
    """of the adapters"""
    targets: tuple[str, ...] = ("to_q", "to_v", "conv1")
    """layers that are adapted"""

    @property
    def needs(self):
        return frozenset({"pairs", "teacher"})

    @property
    def student(self):
        return "velocity"


class Recipe:
    sampler = "euler"

    def __init__(self, config, teacher):
        self.config = config

    def networks(self, init):
        student = Adapter(init.velocity_field(), self.config.rank, 4.0, self.config.targets, lr=2.0)
        return {"student": student, "slow": Copy("student", 0.5)}

    def turns(self, step, images):
        yield Turn("student", self.loss)

    def loss(self, nets, batch, ctx):
        data, noise = batch.pairs.data, batch.pairs.noise
        t, path = ctx.draw.uniform("t", data), nets["student"].interpolant
        x_t, v = path.mix(data, noise, t), path.velocity(data, noise, t)
        found = nets["student"](x_t, t, batch.cond)
        slow = nets["slow"](x_t, t, batch.cond).detach()
        return Loss((distances.mse(found, v) + 0.1 * distances.mse(found, slow)).mean())
