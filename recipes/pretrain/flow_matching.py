"""Flow matching (Lipman et al. 2022, arXiv 2210.02747; Liu et al. 2022, arXiv 2209.03003): train a teacher on data.

Minimises E || v(x_t, t) - (noise - data) ||^2 / d, x_t = (1 - t) data + t noise. The best v(x, t) is
E[noise - data | x_t = x]. The condition is dropped with probability label_dropout, for guidance (Ho & Salimans 2022,
arXiv 2207.12598). Couplings make paths straighter: ot, optimal transport, or ot_replacement, pairs drawn from its plan
(Tong et al. 2023, arXiv 2302.00482); immiscible, ot with unsquared distances, and immiscible_knn, the nearest of k
noises (Li et al. 2024, arXiv 2406.12303; 2025, arXiv 2505.18521); weighted, L = sum w l / sum w, w = exp(-cost/epsilon)
(Calvo-Ordonez et al. 2025, arXiv 2507.22270). immiscible_knn and weighted slightly change the distribution of samples.

Deviations: pairs and weights are made within blocks of the global batch. Data keeps its class; the noise of each class
is Gaussian only with within_classes. Immiscible distances lack a factor of 0.1, which changes nothing. Cost and
epsilon are unverified, so they are options. Logit-normal t (Esser et al. 2024, arXiv 2403.03206) is rarely near 1.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch import Tensor, zeros

from distill.core.errors import InputError
from distill.flow import couplings, distances, times
from distill.flow.fields import drop_condition
from distill.protocols import Batch, Cond, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn

USED_BY = {"coupling_block": [*couplings.MATCHINGS, "weighted"], "within_classes": [*couplings.MATCHINGS]}
USED_BY |= {"candidates": ["immiscible_knn"], "cost": ["weighted"], "epsilon": ["weighted"]}


class Config(BaseModel):
    """Options of pretrain/flow_matching."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    time_law: Literal["uniform", "logit_normal"] = "uniform"
    """distribution of the training times"""
    mu: float | None = None
    """mean of logit(t) under logit_normal; null: 0"""
    sigma: PositiveFloat | None = None
    """standard deviation of logit(t) under logit_normal; null: 1"""
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """probability of dropping the class label (for classifier-free guidance); needs classes"""
    coupling: Literal["independent", "ot", "ot_replacement", "immiscible", "immiscible_knn", "weighted"] = "independent"
    """how noise is assigned to data; ot_replacement samples pairs from the transport plan and may repeat samples"""
    coupling_block: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    """number of samples matched or weighted together; must divide the micro-batch; null: 64"""
    within_classes: bool | None = None
    """match only samples of the same class; null: false"""
    candidates: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """for immiscible_knn: number of noise vectors per sample, k, of which the nearest is used; null: 4"""
    cost: Literal["squared", "distance"] | None = None
    """for weighted: cost of a pair, ||data - noise||^2 or ||data - noise||; null: squared"""
    epsilon: PositiveFloat | None = None
    """for weighted; increase it if effective_share, in the log, is below 0.5; null: twice the block's median cost"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        times.law(self.time_law, self.mu, self.sigma)
        options = self.model_dump(exclude_none=True)
        if unused := [name for name in options if self.coupling not in USED_BY.get(name, [self.coupling])]:
            valid = " or ".join(USED_BY[unused[0]])
            raise ValueError(f"{unused[0]}: no effect with coupling: {self.coupling}; remove it, or use {valid}")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"data"})

    @property
    def student(self) -> str:
        return "velocity"

    @property
    def rows_together(self) -> int:
        return (self.coupling_block or 64) if self.coupling in USED_BY["coupling_block"] else 1


class Recipe:
    sampler = "euler"
    null: Callable[[Cond], Cond]  # set by `networks`

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.law = config, times.law(config.time_law, config.mu, config.sigma)

    def networks(self, init: Init) -> dict[str, Role]:
        first = init.conditioning.collate(zeros(1).long())
        for option, has_effect in {"label_dropout": bool(first), "within_classes": "class_labels" in first}.items():
            if option in self.config.model_fields_set and not has_effect:
                raise InputError(f"{option} has no effect without classes; remove it, or give labelled data")
        self.null = init.null
        return {"student": Trained(init.velocity_field())}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        c, student, (data, noise, cond) = self.config, nets["student"], self.coupled(batch, ctx)
        t = self.law(ctx.draw.uniform("t", data))  # [B]
        if cond and c.label_dropout > 0:
            cond = drop_condition(cond, self.null(cond), ctx.draw.uniform("dropped", data) < c.label_dropout)
        x_t, v = student.interpolant.mix(data, noise, t), student.interpolant.velocity(data, noise, t)
        losses = distances.mse(student(x_t, t, cond), v)
        if c.coupling != "weighted":
            return Loss(losses.mean())
        cost = couplings.distance(data, noise) ** (1 if c.cost == "distance" else 2)
        weights, share = couplings.gibbs_weights(cost, c.rows_together, c.epsilon)
        return Loss((weights * losses).mean(), {"effective_share": share})

    def coupled(self, batch: Batch, ctx: Context) -> tuple[Tensor, Tensor, Cond]:
        """Data, the noise assigned to each sample, and the data's condition."""
        assert batch.data is not None
        c, data, cond, noise = self.config, batch.data, batch.cond, ctx.draw.normal("noise", batch.data)
        if c.coupling == "immiscible_knn":
            more = (ctx.draw.normal(f"noise {i}", data) for i in range(1, c.candidates or 4))
            return data, couplings.nearest(data, noise, more), cond
        if c.coupling not in couplings.MATCHINGS:
            return data, noise, cond
        u, labels = ctx.draw.uniform("pairs", data), cond["class_labels"] if c.within_classes else None
        rows, others = couplings.MATCHINGS[c.coupling](data, noise, u, c.rows_together, labels)
        return data[rows], noise[others], {name: value[rows] for name, value in cond.items()}
