"""Reflow (Liu et al. 2022, arXiv 2209.03003, Alg. 1): regress the straight line between the ends of teacher paths.

Minimises E || v(x_t, t) - (noise - data) ||^2 / d with data = ODE(noise), x_t = (1 - t) data + t noise. Where the
minimiser is zero its paths are straight and one Euler step is the teacher's map.

Deviations: t covers [0, 1), where the authors' code stops at 0.999, since our samplers start at exactly 1. The
pseudo-Huber distance and the time laws u_shaped and exp10 are those of rf++ (Lee et al. 2024, arXiv 2405.20320).
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict

from distill import distances, times
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn

DISTANCES = {"l2": distances.mse, "pseudo_huber": distances.pseudo_huber}


class Config(BaseModel):
    """Options of reflow/reflow."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    time_law: Literal["uniform", "u_shaped", "exp10"] = "uniform"
    """density of the training times: u_shaped prefers both ends, exp10 the noise"""
    distance: Literal["l2", "pseudo_huber"] = "l2"
    """between predicted and true velocity, per sample"""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher", "pairs"})

    @property
    def student(self) -> str:
        return "velocity"


class Recipe:
    sampler = "euler"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.law, self.distance = times.law(config.time_law), DISTANCES[config.distance]

    def networks(self, init: Init) -> dict[str, Role]:
        return {"student": Trained(init.velocity_field())}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.pairs is not None
        data, noise = batch.pairs.data, batch.pairs.noise
        t = self.law(ctx.draw.uniform("t", data))  # [B]
        student = nets["student"]
        x_t, v = student.interpolant.mix(data, noise, t), student.interpolant.velocity(data, noise, t)
        return Loss(self.distance(student(x_t, t, batch.cond), v).mean())
