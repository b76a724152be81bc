"""SeqRF (Yoon & Lee 2024, arXiv 2402.06461): reflow on each of K segments of time, from stored segments of paths.

Minimises E || v(x_t, t) - (x_s - x_e)/(t_s - t_e) ||^2 / d over segments from t_s to t_e < t_s. x_e = ODE(x_s) is the
end of a segment, x_t is on the line between x_s and x_e, and t is uniform. Paths are less curved within a segment, so
the total error is smaller. If the loss is zero, one Euler step per segment maps x_s to the same x_e as the teacher's
ODE. With `times_per_segment: 1`, this is the paper's distillation of each segment to one step.

Deviations: where the authors' segments start is unverified. Here, it depends on the pairs. With `paths: segments`, a
segment starts from noised real data. With `paths: trajectories`, it is part of the teacher's own path, chosen at random
for each sample. All segments are equally likely, whatever their length. The number of segments follows from the pairs'
`times`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from distill.core.errors import InputError
from distill.flow import distances
from distill.flow.times import discrete
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn
from recipes.reflow import _segments


class Config(BaseModel):
    """Options of reflow/seqrf."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    times_per_segment: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """number of equally spaced training times per segment; 1: only its start, for K steps only; null: all times"""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher", "pairs", "states"})

    @property
    def student(self) -> str:
        return "velocity"


class Recipe:
    sampler = "euler"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config = config

    def networks(self, init: Init) -> dict[str, Role]:
        return {"student": Trained(init.velocity_field())}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def t_grids(self, times: Sequence[float] | None) -> Mapping[int, Sequence[float]]:
        if times is None:
            raise InputError("reflow/seqrf: all its pairs stages need the same times")
        return _segments.grids(torch.tensor(times, dtype=torch.float64), self.config.times_per_segment)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.pairs is not None
        noise, levels, student = batch.pairs.noise, self.config.times_per_segment, nets["student"]
        segment, u = _segments.stored(batch.pairs, ctx.draw.uniform("segment", noise)), ctx.draw.uniform("t", noise)
        part = 1 - u if levels is None else discrete(u, levels)
        t = torch.lerp(segment.t_e, segment.t_s, part)  # [B], t_e < t <= t_s
        return Loss(distances.mse(student(segment.at(t), t, batch.cond), segment.velocity).mean())
