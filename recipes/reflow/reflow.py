"""Reflow (Liu et al. 2022, arXiv 2209.03003, Alg. 1): regress the straight line between the ends of teacher paths.

Minimises E || v(x_t, t) - (noise - data) ||^2 / d with data = ODE(noise), x_t = (1 - t) data + t noise. Where the
minimiser is zero its paths are straight and one Euler step is the teacher's map. With data_weight, that times the same
loss on real data and independent noise is added: it holds the student to the data where rounds of reflow drift away.

Deviations: t covers [0, 1), where the authors' code stops at 0.999, since our samplers start at exactly 1. A later
round starts from the exported weights, averages if so, the paper's from raw ones. The pseudo-Huber distance and the
time laws u_shaped and exp10 are those of rf++ (Lee et al. 2024, arXiv 2405.20320); real data always has the squared
distance: x_t does not determine its velocity, and only the square finds the mean.
"""

from collections.abc import Callable, Iterator
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, PositiveFloat, model_validator
from torch import Tensor, nn

from distill.flow import distances, times
from distill.protocols import Batch, Cond, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn

DISTANCES = {"l2": distances.mse, "pseudo_huber": distances.pseudo_huber}


class Config(BaseModel):
    """Options of reflow/reflow."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    time_law: Literal["uniform", "u_shaped", "exp10", "logit_normal"] = "uniform"
    """density of the training times; u_shaped: at both ends, exp10: at the noise"""
    mu: float | None = None
    """mean of logit(t) under logit_normal; null: 0"""
    sigma: PositiveFloat | None = None
    """standard deviation of logit(t) under logit_normal; null: 1"""
    distance: Literal["l2", "pseudo_huber"] = "l2"
    """between predicted and true velocity, per sample"""
    data_weight: PositiveFloat | None = None
    """of flow matching on real data beside the pairs; it fights straightness, so at most 0.1; null: none"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        times.law(self.time_law, self.mu, self.sigma)
        return self

    @property
    def needs(self) -> frozenset[str]:
        pairs = frozenset({"teacher", "pairs"})
        return pairs if self.data_weight is None else pairs | {"data"}

    @property
    def student(self) -> str:
        return "velocity"


class Recipe:
    sampler = "euler"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.law, self.distance = times.law(config.time_law, config.mu, config.sigma), DISTANCES[config.distance]
        self.data_weight = config.data_weight

    def networks(self, init: Init) -> dict[str, Role]:
        return {"student": Trained(init.velocity_field())}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.pairs is not None
        data, noise = batch.pairs.data, batch.pairs.noise
        t = self.law(ctx.draw.uniform("t", data))  # [B]
        on_pairs = regress(nets["student"], data, noise, t, batch.cond, self.distance)
        if self.data_weight is None:
            return Loss(on_pairs)
        assert batch.data is not None
        data, noise = batch.data, ctx.draw.normal("real_noise", batch.data)
        t = self.law(ctx.draw.uniform("real_t", data))
        on_data = regress(nets["student"], data, noise, t, batch.data_cond, distances.mse)
        total = on_pairs + self.data_weight * on_data
        return Loss(total, {"pairs": on_pairs.detach(), "data": on_data.detach()})


def regress(
    student: nn.Module, data: Tensor, noise: Tensor, t: Tensor, cond: Cond, distance: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The distance of v(x_t, t) to the velocity of the line between data and noise, in the mean over the batch."""
    x_t, v = student.interpolant.mix(data, noise, t), student.interpolant.velocity(data, noise, t)
    return distance(student(x_t, t, cond), v).mean()
