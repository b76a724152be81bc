"""The error of storing pairs, and whether inverted noise looks like noise."""

from typing import Self

import torch
from pydantic import ConfigDict, NonNegativeFloat
from torch import Tensor

from distill.core.field_types import FrozenModel
from distill.shards.values import restored, stored

TOLERATED = 0.01  # relative RMS of the rounding error
TOLERATED_MEAN, TOLERATED_VARIANCE, TOLERATED_CORRELATION = 0.05, 0.1, 0.1


def _mean_square(values: Tensor) -> float:
    """The mean square of finite float32 values, even if their squares overflow float32."""
    found = values.square().mean(dtype=torch.float64)
    return (found if found.isfinite() else values.double().square().mean()).item()


class Rounding(FrozenModel):
    """Mean squares of values (`signal`) and of the errors that storing them makes (`error`)."""

    model_config = ConfigDict(allow_inf_nan=False)

    signal: NonNegativeFloat
    error: NonNegativeFloat

    @classmethod
    def of(cls, values: Tensor, dtype: str) -> Self:
        if dtype == "float32":
            return cls(signal=_mean_square(values), error=0.0)
        return cls(signal=_mean_square(values), error=_mean_square(restored(stored(values, dtype)) - values))

    @property
    def relative(self) -> float:
        """The RMS of the error divided by that of the values."""
        return float((self.error / self.signal) ** 0.5) if self.signal else 0.0


class Whiteness(FrozenModel):
    """Statistics of inverted noise: the means of its elements, of their squares, and of the products of neighbours.

    Neighbours are adjacent elements of a vector, or pixels of an image that are adjacent in a row or a column. For
    standard normal noise, the three means are 0, 1 and 0.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    mean: float
    square: float
    neighbours: float

    @classmethod
    def of(cls, noise: Tensor) -> Self:
        """noise: [B, ...]."""
        x = noise.double()
        products = [x[..., 1:] * x[..., :-1]]
        if x.ndim > 2:
            products.append(x[..., 1:, :] * x[..., :-1, :])
        flat = torch.cat([each.flatten() for each in products])
        neighbours = flat.mean().item() if flat.numel() else 0.0
        return cls(mean=x.mean().item(), square=x.square().mean().item(), neighbours=neighbours)

    @property
    def variance(self) -> float:
        return self.square - self.mean**2

    @property
    def correlation(self) -> float:
        """The correlation of neighbours."""
        return (self.neighbours - self.mean**2) / self.variance if self.variance > 0 else 0.0

    def faults(self, elements: int) -> list[str]:
        """The statistics that deviate too much, as text. A sampling error for `elements` elements is allowed for."""
        chance = 4 / elements**0.5
        found = {
            f"mean {self.mean:.3f} instead of 0": abs(self.mean) > TOLERATED_MEAN + chance,
            f"variance {self.variance:.3f} instead of 1": abs(self.variance - 1) > TOLERATED_VARIANCE + 1.5 * chance,
            f"correlation of neighbours {self.correlation:.3f} instead of 0": abs(self.correlation)
            > TOLERATED_CORRELATION + chance,
        }
        return [what for what, wrong in found.items() if wrong]
