"""Constant Acceleration Flow (Park et al. 2024, arXiv 2411.00322): curved paths, determined by their initial velocity.

A teacher's path goes from noise to data = ODE(noise). Let line = noise - data and u = 1 - t. The path that leaves the
noise with velocity v and reaches the data with constant acceleration is x_t = noise - u v + u^2 (v - line), where
dv/dt = 2 (v - line). One network learns the initial velocity v = h line, at points of this path. The other network gets
the velocity v(noise, 1) that the first predicts, and learns the acceleration 2 (v - line) of the path that starts with
this velocity. So the second network corrects errors of the first. Sampling calls the first network once and the second
N times: N steps are N + 1 network calls.

Deviations: both networks are trained together, the second one with the current weights of the first, not with averages
that may be exported; the paper trains the first network, then freezes it. t is uniform in [0, 1); the authors draw one
of 1,001 values. Sampling calls the network at exactly i/N; the authors truncate i/N to thousandths. LPIPS compares the
data with the end of the path that a prediction defines. For the velocity, the authors' formula for this end is wrong by
u (1 - u) (h - 1) line within the path; ours is exact. Not implemented: their third stage, a GAN, and the inversion of
data. Samples are not clamped to [-1, 1].
"""

from collections.abc import Iterator
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.flow import distances
from distill.flow.interpolants import like
from distill.protocols import Batch, Context, Frozen, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(distances.LpipsOptions):
    """Options of reflow/caf."""

    h: Annotated[float, Field(gt=0)] = 1.5
    """initial velocity divided by the velocity of the straight line; 1: no acceleration; above 1: paths slow down"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if (self.lpips_trunk is None) != (self.lpips_path is None):
            raise ValueError("lpips_trunk and lpips_path must be given together; give both or neither")
        if self.lpips_trunk is None and (given := self.lpips_given()):
            raise ValueError(f"{', '.join(given)}: no effect without lpips_trunk; give it, or remove them")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher", "pairs"})

    @property
    def student(self) -> str:
        return "acceleration"


class Recipe:
    sampler = "accelerated"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.codec = config.codec_of(teacher, "remove it and lpips_path")
        self.config = config

    def networks(self, init: Init) -> dict[str, Role]:
        roles = dict[str, Role](student=Trained(init.acceleration()))
        if (lpips := self.config.lpips(self.codec)) is not None:
            roles["lpips"] = Frozen(lpips)
        return roles

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.pairs is not None
        data, noise, cond, h = batch.pairs.data, batch.pairs.noise, batch.cond, self.config.h
        line, student, t = noise - data, nets["student"], ctx.draw.uniform("t_velocity", data)
        x_t = bent(noise, line, h * line, t)
        v = student(x_t, t, None, cond)
        logs = {"velocity": distances.pseudo_huber(v, h * line).mean()}
        if "lpips" in nets:
            factor = t * (1 + (1 - t) * (1 - h)) / h  # x_t - factor v is the data, if v = h line
            logs["velocity_lpips"] = nets["lpips"](x_t - like(factor, v) * v, data).mean()
        with torch.no_grad():
            v = student(noise, torch.ones_like(t), None, cond)
        t = ctx.draw.uniform("t", data)
        x_t = bent(noise, line, v, t)
        a = student(x_t, t, v, cond)
        logs["acceleration"] = distances.pseudo_huber(a, 2 * (v - line)).mean()
        if "lpips" in nets:
            arrived = x_t - like(t, v) * v + like(t * (2 - t) / 2, a) * a
            logs["acceleration_lpips"] = nets["lpips"](arrived, data).mean()
        return Loss(torch.stack(list(logs.values())).sum(), {name: each.detach() for name, each in logs.items()})


def bent(noise: Tensor, line: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x_t of the path from `noise`, with initial velocity v, to noise - line: noise - u v + u^2 (v - line)."""
    u = like(1 - t, noise)
    return noise - u * v + u.square() * (v - line)
