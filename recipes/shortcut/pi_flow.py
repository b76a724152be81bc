"""pi-Flow (Chen et al. 2025, arXiv 2510.14974): one call predicts a policy, which is asked where it leads.

A student of N steps calls its network at the start r of each interval. The outputs are the parameters of a policy, a
velocity field that holds until the interval's end and needs no further call (see networks/policies.py). The policy is
followed to a few random times a_1 > a_2 > ... of the interval, without gradients, and learns the teacher's velocity v
at the states x_a that it visits there:
    minimise E sum_i || policy(x_a_i, a_i) - v(x_a_i, a_i) ||^2 / (d times the number of times).
`policy: gaussian` is a mixture of K Gaussians per pixel, of all its channels; `data` has K predictions of the data, at
even times. The states are followed with Gaussians that are left out at random (`dropout`), so that none is needed.

Deviations: policies are followed in midpoint steps, as in sampling, where the authors take Euler steps. Gaussians start
from the teacher's velocity with noise. States come from real data; for later steps, the authors can also chain
intervals. Their mixing of the teacher's own paths into the first steps of a training is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from distill.flow import distances
from distill.flow.guidance_options import GuidanceScale
from distill.flow.times import one_of, uniform_grid
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(BaseModel):
    """Options of shortcut/pi_flow."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    steps: Annotated[int, Field(gt=0, le=1000)] = 1
    """number of steps of the student, N"""
    policy: Literal["gaussian", "data"] = "gaussian"
    """what the outputs describe"""
    components: Annotated[int, Field(gt=0, le=256)] = 8
    """number of Gaussians, or of predictions of the data, K"""
    asked: Annotated[int, Field(gt=0, le=64)] = 2
    """times in an interval at which the teacher is called"""
    substeps: Annotated[int, Field(gt=0, le=1000)] = 8
    """midpoint steps in which the policy is followed from one of these times to the next; they call no network"""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """probability that a Gaussian is left out where the policy is followed; null: 0.05"""
    guidance_scale: GuidanceScale = 1.0
    """guidance scale of the teacher, which the student learns; 1: no guidance; [low, high]: it is an input"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.policy == "data" and self.dropout is not None:
            raise ValueError("dropout has no effect with policy: data; remove it")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"data", "teacher"})

    @property
    def student(self) -> str:
        return "flow_map"


class Recipe:
    sampler = "jump"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.teacher = config, None if teacher is None else teacher.guided(config.guidance_scale)

    def networks(self, init: Init) -> dict[str, Role]:
        c = self.config  # equal Gaussians would have equal gradients, and stay equal
        return {"student": Trained(init.policy(c.policy, c.components, spread=0.1 if c.policy == "gaussian" else 0.0))}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def t_grids(self, times: Sequence[float] | None) -> Mapping[int, Sequence[float]]:
        return {self.config.steps: uniform_grid(self.config.steps).tolist()}

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        c, student, data = self.config, nets["student"], batch.data
        assert data is not None and self.teacher is not None
        r = (one_of(c.steps, ctx.draw.uniform("r", data)) + 1) / c.steps  # [B], starts of intervals
        x_r, end = student.interpolant.mix(data, ctx.draw.normal("noise", data), r), r - 1 / c.steps
        outputs = student(x_r, r, None, batch.cond)  # [B, M, ...]
        parts = torch.stack([ctx.draw.uniform(f"time{i}", data) for i in range(c.asked)])
        times = r - (r - end) * parts.clamp(max=0.999).sort(dim=0).values  # [asked, B], decreasing, above 0
        x, t, kept, total = x_r, r, self.some(outputs.detach(), ctx), torch.zeros_like(r)
        for a in times:
            with torch.no_grad():
                x, t = student.follow(kept, x_r, r, end, x, t, a, c.substeps), a
                v = self.teacher(x, t, batch.cond)
            total = total + distances.mse(student.velocity(outputs, x_r, r, end, x, t), v)
        return Loss((total / c.asked).mean())

    def some(self, outputs: Tensor, ctx: Context) -> Tensor:
        """The outputs [B, M, ...] without some of the Gaussians: their weights become nearly 0."""
        c = self.config
        if c.policy == "data" or c.dropout == 0:
            return outputs
        drawn = torch.stack([ctx.draw.uniform(f"keep{k}", outputs) for k in range(c.components)], dim=1)  # [B, K]
        left_out = (drawn < (0.05 if c.dropout is None else c.dropout)).to(outputs.dtype)
        change = torch.zeros(outputs.shape[:2], dtype=outputs.dtype, device=outputs.device)
        change[:, c.components : 2 * c.components] = -1e4 * left_out
        return outputs + change.reshape(*change.shape, *[1] * (outputs.ndim - 2))
