"""Reflow (Liu et al. 2022, arXiv 2209.03003, Alg. 1): regress the straight line between the ends of teacher paths.

Minimises E || v(x_t, t) - (noise - data) ||^2 / d, where data = ODE(noise), x_t = (1 - t) data + t noise, and d is the
number of elements. If the loss is zero, the student's paths are straight, and one Euler step maps noise to the same
data as the teacher's ODE. With data_weight, the same loss on real data and independent noise is added, times this
weight. It keeps the student close to the data over several rounds of reflow.

Deviations: t is in [0, 1), because our samplers start at exactly 1; the authors' code stops at 0.999. A later round
starts from the exported weights, which may be averages; the paper's starts from raw weights. The pseudo-Huber distance
and the time distributions u_shaped and exp10 are from rf++ (Lee et al. 2024, arXiv 2405.20320). For real data, the
distance is always squared: x_t does not determine the velocity there, and only the squared error finds its mean.
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
    """distribution of the training times; u_shaped: more at both ends, exp10: more near the noise"""
    mu: float | None = None
    """mean of logit(t) under logit_normal; null: 0"""
    sigma: PositiveFloat | None = None
    """standard deviation of logit(t) under logit_normal; null: 1"""
    distance: Literal["l2", "pseudo_huber"] = "l2"
    """distance between predicted and true velocity, per sample"""
    data_weight: PositiveFloat | None = None
    """weight of flow matching on real data; use at most 0.1, as it makes paths less straight; null: none"""

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
    """Mean over the batch of the distance between v(x_t, t) and the velocity of the line from data to noise."""
    x_t, v = student.interpolant.mix(data, noise, t), student.interpolant.velocity(data, noise, t)
    return distance(student(x_t, t, cond), v).mean()
