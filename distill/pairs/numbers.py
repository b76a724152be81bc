"""How the numbers of pairs are stored, what that costs them, and whether inverted noise is noise."""

from typing import Self

import torch
from pydantic import ConfigDict, NonNegativeFloat
from torch import Tensor

from distill.core.field_types import FrozenModel

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}
LEVELS = 127.5  # of uint8: -1 is 0, 1 is 255
TOLERATED = 0.01  # rounding error, relative to the numbers themselves
TOLERATED_MEAN, TOLERATED_VARIANCE, TOLERATED_CORRELATION = 0.05, 0.1, 0.1


def stored(values: Tensor, dtype: str) -> Tensor:
    """Float32 values of any shape as they are written; those of uint8 are clamped to [-1, 1]."""
    if dtype == "uint8":
        return ((values.clamp(-1, 1) + 1) * LEVELS).round().to(torch.uint8)
    return values.to(DTYPES[dtype])


def restored(values: Tensor) -> Tensor:
    """What was written, in float32."""
    return values.float() / LEVELS - 1 if values.dtype == torch.uint8 else values.float()


def _mean_square(values: Tensor) -> float:
    """Of float32 values, finite: also where their squares are too large for float32."""
    found = values.square().mean(dtype=torch.float64)
    return (found if found.isfinite() else values.double().square().mean()).item()


class Rounding(FrozenModel):
    """Mean squares of stored numbers, and of what storing changed in them."""

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
        """Root mean square of the error, over that of the numbers."""
        return float((self.error / self.signal) ** 0.5) if self.signal else 0.0


class Whiteness(FrozenModel):
    """Means over inverted noise: of its elements, their squares, and products of neighbours (adjacent elements of a
    vector, adjacent pixels of an image in either direction). Standard normal noise has 0, 1 and 0.
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
        """Of neighbours."""
        return (self.neighbours - self.mean**2) / self.variance if self.variance > 0 else 0.0

    def faults(self, elements: int) -> list[str]:
        """Which numbers are off by more than is tolerated, sampling error of so many elements aside."""
        chance = 4 / elements**0.5
        found = {
            f"mean {self.mean:.3f} (0)": abs(self.mean) > TOLERATED_MEAN + chance,
            f"variance {self.variance:.3f} (1)": abs(self.variance - 1) > TOLERATED_VARIANCE + 1.5 * chance,
            f"correlation of neighbours {self.correlation:.3f} (0)": abs(self.correlation)
            > TOLERATED_CORRELATION + chance,
        }
        return [what for what, wrong in found.items() if wrong]
