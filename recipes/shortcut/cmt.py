"""CMT, consistency mid-training (Hu et al. 2025, arXiv 2509.24526): jumps between stored states of the teacher's paths.

From a state at t_i to a later one at t_j < t_i, the average velocity is u(x_i, t_i, t_j) = (x_i - x_j)/(t_i - t_j). No
target comes from the student itself, and no derivative is needed, so it learns fast, as far as the solver of the paths
is right. It is meant as the first stage of another: `init` of consistency, scm, meanflow or flow_map starts from it.
With `to_data: 1`, all jumps end at the data, which is what consistency models learn; it is then sampled as these are.

Deviations: paths begin with noise at t = 1; the authors' begin with noised data. The distance is squared, where they
use LPIPS. That a jump may end at any state is unverified.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from distill.flow import distances
from distill.flow.interpolants import like
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(BaseModel):
    """Options of shortcut/cmt."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    to_data: Annotated[float, Field(ge=0, le=1)] = 0.25
    """fraction of the samples whose jump ends at the data; of the others, all pairs of states are equally likely"""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher", "pairs", "states"})

    @property
    def student(self) -> str:
        return "flow_map"


class Recipe:
    sampler: str = "jump"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.sampler = config, "renoise" if config.to_data == 1 else "jump"

    def networks(self, init: Init) -> dict[str, Role]:
        return {"student": Trained(init.flow_map(to_data=self.config.to_data == 1))}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.pairs is not None and batch.pairs.states is not None and batch.pairs.times is not None
        states, times, noise = batch.pairs.states, batch.pairs.times, batch.pairs.noise
        last, rows = times.shape[1] - 1, torch.arange(len(noise), device=noise.device)
        pairs = torch.triu_indices(last + 1, last + 1, 1, device=noise.device)  # [2, number of pairs], i < j
        i, j = pairs[:, (ctx.draw.uniform("pair", noise) * pairs.shape[1]).long()]
        j = torch.where(ctx.draw.uniform("to_data", noise) < self.config.to_data, last, j)
        t, s = times[rows, i], times[rows, j]
        x_t, x_s = states[rows, i], states[rows, j]
        velocity = (x_t - x_s) / like(t - s, x_t)
        return Loss(distances.mse(nets["student"](x_t, t, s, batch.cond), velocity).mean())
