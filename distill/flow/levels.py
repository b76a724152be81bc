"""The two neighbouring times of consistency models: their options, and their curricula over the training."""

import math
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch import Tensor

from distill.flow import times

FIRST, LAST = 0.002, 0.9999  # sigma 0.002, EDM's smallest, and 9999; at t = 0 and t = 1, s would be equal to t
LEAST, MOST, RHO = 0.002, 80.0, 7  # EDM's grid of sigma: the two ends and the exponent


class LevelOptions(BaseModel):
    """The options of the times t and s of a consistency model."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    times: Literal["grid", "continuous"] = "grid"
    """grid: t and s are neighbours on a grid; continuous: Easy Consistency Tuning"""
    spacing: Literal["uniform", "edm"] | None = None
    """spacing of the grid: uniform in t, or as the authors', which is EDM's, dense near the data; null: uniform"""
    levels: Annotated[int, Field(gt=0, le=100_000)] = 18
    """number of steps of the grid, at the start of training"""
    curriculum: Literal["ct", "ict"] | None = None
    """how the number of steps grows over the training to most_levels: ct: like a square root; ict: by doublings"""
    most_levels: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """number of steps of the grid at the end of the curriculum; null: 150 for ct, 1280 for ict"""
    level_law: Literal["uniform", "log_normal"] | None = None
    """distribution of the steps of the grid; log_normal: that of mu and sigma, as in iCT; null: uniform"""
    mu: float = -1.1
    """mean of logit(t), the logarithm of noise over signal, under continuous and log_normal"""
    sigma: PositiveFloat = 2.0
    """standard deviation of logit(t) under continuous and log_normal"""
    halving_images: Annotated[int, Field(gt=0, le=10**13)] | None = None
    """t - s is halved after every so many images, up to ten times (with bf16, plan for at most three); null: never"""

    @model_validator(mode="after")
    def _levels_have_effect(self) -> Self:
        continuous = self.times == "continuous"
        unused = set() if self.level_law == "log_normal" else {"mu", "sigma"}
        if continuous:
            unused = {"levels", "spacing", "curriculum", "level_law"}
        if found := sorted(unused & self.model_fields_set):
            remedy = "" if continuous else ", or use level_law: log_normal"
            raise ValueError(f"{', '.join(found)}: no effect with times: {self.times}; remove them{remedy}")
        if continuous and self.halving_images is None:
            raise ValueError("times: continuous needs halving_images; without it, s stays 0 for most samples")
        if self.curriculum is None and self.most_levels is not None:
            raise ValueError("most_levels has no effect without curriculum; remove it, or use curriculum: ict")
        if self.curriculum is not None and self.halving_images is not None:
            raise ValueError(f"halving_images has no effect with curriculum: {self.curriculum}; remove it")
        if self.curriculum is not None and self.highest < self.levels:
            raise ValueError(f"most_levels={self.highest} must be at least levels={self.levels}")
        return self

    @property
    def highest(self) -> int:
        """The number of steps of the grid at the end of the curriculum."""
        return self.most_levels or {"ct": 150, "ict": 1280}[self.curriculum or "ict"]

    def steps(self, images: int, progress: float) -> int:
        """The number of steps of the grid. CT: N(k) - 1 of its paper, sec. 5; iCT: Song & Dhariwal 2023, eq. (8)."""
        low, high = self.levels, self.highest
        if self.curriculum == "ct":  # its s0 is low + 1
            return math.ceil(math.sqrt(progress * ((high + 1) ** 2 - (low + 1) ** 2) + (low + 1) ** 2) - 1)
        if self.curriculum == "ict":
            return min(low << math.floor(progress * (math.floor(math.log2(high / low)) + 1)), high)
        return low << self.halvings(images)

    def halvings(self, images: int) -> int:
        return min(images // (self.halving_images or images + 1), 10)

    def neighbours(self, u: Tensor, images: int, progress: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """t, s and t - s [B] from uniform draws u [B]: 0 <= s < t <= 1."""
        if self.times == "continuous":
            t = times.logit_normal(u, self.mu, self.sigma).clamp(FIRST, LAST)
            return t, *times.nearer(t, 0.5 ** (self.halvings(images) + 1))
        n, spacing = self.steps(images, progress), self.spacing or "uniform"
        at = (
            u * n if self.level_law != "log_normal" else n * _place(times.logit_normal(u, self.mu, self.sigma), spacing)
        )
        i = at.floor().clamp(0, n - 1)  # s is grid time i, and t is i + 1
        if spacing == "uniform":
            return (i + 1) / n, i / n, torch.full_like(u, 1 / n)
        t, s = (_edm_time(k.double() / n) for k in (i + 1, i))
        return t.to(u.dtype), s.to(u.dtype), (t - s).to(u.dtype)


def _place(t: Tensor, spacing: str) -> Tensor:
    """Where a time is in the grid, from 0 (data) to 1 (noise)."""
    if spacing == "uniform":
        return t
    low, high = LEAST ** (1 / RHO), MOST ** (1 / RHO)
    return ((t / (1 - t)) ** (1 / RHO) - low) / (high - low)


def _edm_time(place: Tensor) -> Tensor:
    """The time at a place of EDM's grid. Its ends are moved to t = 0 and t = 1, where students are sampled."""
    low, high = LEAST ** (1 / RHO), MOST ** (1 / RHO)
    sigma = (low + place * (high - low)) ** RHO
    return torch.where(place <= 0, 0.0, torch.where(place >= 1, 1.0, sigma / (1 + sigma)))
