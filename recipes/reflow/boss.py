"""BOSS fine-tuning (Nguyen et al. 2023, arXiv 2312.16414, sec. 4): each of K long steps lands on the teacher's path.

Minimises E || v(x_i, t_i) - (x_j - x_i)/(t_j - t_i) ||^2 / d over the steps i -> j of a teacher's trajectory; one step
is drawn uniformly for each sample. If the loss is zero, K Euler steps end at the same point as the teacher's path. The
times are those at which the pairs store states. Pairs with `paths: trajectories` and `optimal_times: K` store states at
the times for which K Euler steps have the smallest total error. (`distill schedule` prints these times; set its --fine
to the number of solver steps of the pairs.) The student can be sampled only along these times.

Deviations: the whole network is trained, without LoRA. The perceptual distance of the authors' code, which ignores the
length of the step, is not implemented. The network is given t itself; the authors give it 0.999 u + 0.001 with
u = 1 - t. The numbers in the paper's tables are unverified.
"""

from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from distill.core.errors import InputError
from distill.flow import distances
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn
from recipes.reflow import _segments


class Config(BaseModel):
    """reflow/boss has no options; its step times are those of its pairs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

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

    def t_grids(self, times: Sequence[float] | None) -> Mapping[int, Sequence[float]]:
        if times is None:
            raise InputError("reflow/boss: all its pairs stages need the same times")
        return {len(times) - 1: times}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.pairs is not None
        step = _segments.stored(batch.pairs, ctx.draw.uniform("step", batch.pairs.noise))
        return Loss(distances.mse(nets["student"](step.start, step.t_s, batch.cond), step.velocity).mean())
