"""Exponential moving averages of weights (EMA): with half-lives in images, and with lengths relative to training."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

RAMP = 0.05  # the half-life is at most this fraction of the images so far


def decay(half_life: float, images: int, batch: int) -> float:
    """Weight of the old average in a step of `batch` images after `images` images. All arguments are in images.

    It is 0.5 ** (batch / h) with h = min(half_life, 0.05 images), so that the half-life ramps up (Karras et al. 2022,
    arXiv 2206.00364, appendix F.2). The first step copies the weights, so an average does not contain the initial
    weights. This matters because a student often starts as its teacher, which makes no good samples in one step.
    """
    ramped = min(half_life, RAMP * images)
    return 0.5 ** (batch / ramped) if ramped > 0 else 0.0


def exponent(length: float) -> float:
    """The exponent gamma of the power function whose average has a relative length (Karras et al. 2023, eq. 126).

    length: the standard deviation of the averaged times, relative to the time of training: below 12 ** -0.5 = 0.289.
    """
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


def power_decay(length: float, images: int, batch: int) -> float:
    """Weight of the old average in a step of `batch` images after `images` images, for a length relative to training.

    The average after N images is that of the weights after each n <= N with a density proportional to n ** gamma
    (Karras et al. 2023, arXiv 2312.02696, eq. 2 and appendix C.1). The first step copies the weights.
    """
    return (images / (images + batch)) ** (exponent(length) + 1)


class Ema:
    """Averages of `tensors` (a network's fp32 weights by name), on the same device.

    half_lives: in images. lengths: relative to the training so far; see `power_decay`. `averages` has them by these
    numbers; no number may be in both.
    """

    def __init__(self, tensors: dict[str, Tensor], half_lives: Iterable[float], lengths: Iterable[float] = ()) -> None:
        self.tensors = tensors
        self.decays = {**dict.fromkeys(half_lives, decay), **dict.fromkeys(lengths, power_decay)}
        self.averages = {
            which: {name: t.detach().to(torch.float32, copy=True) for name, t in tensors.items()}
            for which in self.decays
        }

    def update(self, images: int, batch: int) -> None:
        """Update the averages after a step of `batch` images that began at `images`."""
        weights = [t.detach().float() for t in self.tensors.values()]
        for which, average in self.averages.items():
            rate = 1 - self.decays[which](which, images, batch)
            torch._foreach_lerp_(list(average.values()), weights, rate)

    def load(self, which: float, state: dict[str, Tensor]) -> None:
        """Copy the averages of one half-life or length from `state`."""
        for name, average in self.averages[which].items():
            average.copy_(state[name])


def mixture(snapshots: list[tuple[int, float]], images: int, length: float) -> list[float]:
    """How to add up averages so that the sum is as close as possible to the average of another length.

    Each average is that of the weights with a density over the time of training; the weighted sum of these densities
    is the closest to the wanted one in the least-squares sense (Karras et al. 2023, sec. 3.2 and algorithm 3). Unlike
    there, the weights of the sum add up to 1, so that weights that never changed stay as they are.

    snapshots: (images, length) of each average. images, length: those of the average that is wanted.
    """
    profiles = [(count, exponent(width)) for count, width in snapshots]
    wanted = (images, exponent(length))
    size = len(profiles)
    system = np.ones((size + 1, size + 1))
    system[size, size] = 0
    system[:size, :size] = [[_product(a, b) for b in profiles] for a in profiles]
    right = np.array([*(_product(a, wanted) for a in profiles), 1.0])
    # Densities differ in size as 1 / images: scaled, so that the condition on the sum has the same size as the others.
    system[:size, :size] *= images
    right[:size] *= images
    found = np.linalg.lstsq(system, right, rcond=None)[0][:size]
    return [float(each) for each in found]


def _product(a: tuple[int, float], b: tuple[int, float]) -> float:
    """The integral over time of the product of two densities (images, gamma) (Karras et al. 2023, eq. 151)."""
    (first, p), (second, q) = sorted([a, b])
    return math.exp(q * math.log(first / second)) * (p + 1) * (q + 1) / ((p + q + 1) * second)
