"""Flow matching (Lipman et al. 2022, arXiv 2210.02747; Liu et al. 2022, arXiv 2209.03003): a teacher from real data.

Minimises E || v(x_t, t) - (noise - data) ||^2 / d with data and noise independent, x_t = (1 - t) data + t noise, so
v(x, t) = E[noise - data | x_t = x]. A conditional network also learns the unconditional velocity, for guidance: the
condition is dropped with probability label_dropout (Ho & Salimans 2022, arXiv 2207.12598).

Deviations: none. The logit-normal law of t is that of Esser et al. 2024, arXiv 2403.03206; it hardly trains t near 1,
the only time that a one-step student sees.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from distill import distances, times
from distill.fields import drop_condition
from distill.guard import InputError
from distill.protocols import Batch, Cond, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(BaseModel):
    """Options of pretrain/flow_matching."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    time_law: Literal["uniform", "logit_normal"] = "uniform"
    """density of the training times"""
    mu: float | None = None
    """mean of logit(t) under logit_normal; null: 0"""
    sigma: PositiveFloat | None = None
    """standard deviation of logit(t) under logit_normal; null: 1"""
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """probability of training a sample without its class; only where there are classes"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.time_law != "logit_normal" and (self.mu is not None or self.sigma is not None):
            raise ValueError(
                f"mu and sigma have no effect with time_law: {self.time_law}; remove them or use logit_normal"
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"data"})

    @property
    def student(self) -> str:
        return "velocity"


class Recipe:
    sampler = "euler"
    null: Callable[[Cond], Cond]  # known once the networks are

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config = config
        self.law = times.law(config.time_law, config.mu, config.sigma)

    def networks(self, init: Init) -> dict[str, Role]:
        if init.num_classes is None and "label_dropout" in self.config.model_fields_set:
            raise InputError("label_dropout has no effect without classes; remove it, or give labelled data")
        self.null = init.null
        return {"student": Trained(init.velocity_field())}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.data is not None
        data, noise = batch.data, ctx.draw.normal("noise", batch.data)
        t = self.law(ctx.draw.uniform("t", data))  # [B]
        student, cond = nets["student"], batch.cond
        if cond:
            cond = drop_condition(cond, self.null(cond), ctx.draw.uniform("dropped", data) < self.config.label_dropout)
        x_t, v = student.interpolant.mix(data, noise, t), student.interpolant.velocity(data, noise, t)
        return Loss(distances.mse(student(x_t, t, cond), v).mean())
