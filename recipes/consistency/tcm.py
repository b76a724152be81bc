"""TCM, truncated consistency (Lee et al. 2024, arXiv 2410.14895): a second stage that learns the noisy part of paths.

The student starts from a consistency model, which stays, frozen, where t < t'. As in consistency/consistency, the ends
of two near points of a path must be equal: |f(x_t, t) - sg(f'(x_s, s))|, with t >= t', and f' = f where s >= t', else
the frozen model's. So f is tied to that model at t', on `boundary` of the batch, where s is always below t', and all
its capacity serves t > t'. Students are sampled from t = 1 along times of at least t'.

Deviations: the path is linear, t' = 0.5 is sigma 1. The law of t is the limit, for zero degrees of freedom, of the
authors' truncated Student-t (0.01 there) of log sigma, with sigma up to 80. Other samples than those of the boundary
have s >= t'. Both parts are means over their expected numbers of rows, so that batches can be divided.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch import Tensor

from distill.flow import distances, solvers, times
from distill.flow.fields import jump_to_data
from distill.flow.guidance_options import GuidanceScale
from distill.flow.interpolants import like
from distill.protocols import Batch, Context, Frozen, Init, Loss, Nets, Role, Teacher, Trained, Turn

HIGHEST, WIDTH = math.log(80), 0.02  # of log sigma: its end, and the width in which it is most likely, 0.2 sqrt(0.01)
MOST_STEPS = 4


class Config(BaseModel):
    """Options of consistency/tcm."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    point: Literal["data", "euler", "heun"] = "euler"
    """how x_s is made: data: from the same data and noise, no teacher; euler or heun: by this step of the teacher"""
    guidance_scale: GuidanceScale = 1.0
    """guidance scale of the teacher, which the student learns; 1: no guidance; [low, high]: it is an input"""
    truncation: Annotated[float, Field(ge=0.05, le=0.95)] = 0.5
    """t', the lowest time that the student is trained for"""
    closeness: Annotated[float, Field(gt=0, le=0.5)] = 0.001
    """how near s is to t: the noise-to-data ratio is smaller by this factor, times 1 to 9 (Easy Consistency Tuning)"""
    boundary: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """fraction of the batch at t', whose target is that of the frozen model"""
    boundary_weight: PositiveFloat = 0.1
    """weight of the mean loss of these samples"""
    huber_c: PositiveFloat | None = None
    """c of the pseudo-Huber distance; null: 0.00054 sqrt(d)"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.point == "data" and self.guidance_scale != 1:
            raise ValueError("guidance_scale has no effect with point: data; remove it, or use heun or euler")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"data", "weights"} if self.point == "data" else {"data", "weights", "teacher"})

    @property
    def student(self) -> str:
        return "flow_map"


class Recipe:
    sampler = "renoise"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config = config
        self.teacher = None if teacher is None or config.point == "data" else teacher.guided(config.guidance_scale)

    def networks(self, init: Init) -> dict[str, Role]:
        return {"student": Trained(init.flow_map(to_data=True)), "first": Frozen(init.flow_map(to_data=True))}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def t_grids(self, times: Sequence[float] | None) -> Mapping[int, Sequence[float]]:
        low = self.config.truncation
        return {n: [1 - (1 - low) * i / max(n - 1, 1) for i in range(n)] + [0.0] for n in range(1, MOST_STEPS + 1)}

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.data is not None
        c, data, noise, student = self.config, batch.data, ctx.draw.normal("noise", batch.data), nets["student"]
        edge, rows, others = ctx.draw.split(c.boundary, data)
        t, s, gap = self.neighbours(ctx.draw.uniform("t", data), edge)
        x_t, x_s = (student.interpolant.mix(data, noise, time) for time in (t, s))
        with torch.no_grad():
            if self.teacher is not None and c.point != "data":
                x_s = solvers.step(self.teacher, x_t, t, s, batch.cond, c.point)
            ends = [torch.zeros_like(x_s), torch.zeros_like(x_s)]
            for number, (network, part) in enumerate(((student, others), (nets["first"], rows))):
                cond = {name: value[part] for name, value in batch.cond.items()}
                ends[number] = ends[number].index_put((part,), jump_to_data(network, x_s[part], s[part], cond))
            target = torch.where(like(edge, x_s), ends[1], ends[0])
        d = data[0].numel()
        scale = (c.huber_c or 0.00054 * math.sqrt(d)) / d
        error = distances.pseudo_huber(jump_to_data(student, x_t, t, batch.cond), target, scale=scale) / gap
        weight = torch.where(edge, c.boundary_weight / c.boundary, 1 / (1 - c.boundary))
        return Loss((weight * error).mean())

    def neighbours(self, u: Tensor, edge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t, s and t - s [B] from uniform draws u [B]. edge: [B] bool, whether t is t', and s below."""
        low = self.config.truncation
        first = math.log(low / (1 - low))  # log sigma of t'
        beyond = WIDTH * torch.sinh(u.clamp(min=1e-4) * math.asinh((HIGHEST - first) / WIDTH))
        t = torch.where(edge, low, torch.sigmoid(first + beyond))
        s, gap = times.nearer(t, self.config.closeness)
        kept = ~edge & (s < low)
        return t, torch.where(kept, low, s), torch.where(kept, t - low, gap)
