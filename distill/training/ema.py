"""Exponential moving averages of weights, with half-lives in images."""

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


class Ema:
    """Averages of `tensors` (a network's fp32 weights by name), for each half-life in images, on the same device."""

    def __init__(self, tensors: dict[str, Tensor], half_lives: list[float]) -> None:
        self.tensors = tensors
        self.averages = {
            half_life: {name: t.detach().to(torch.float32, copy=True) for name, t in tensors.items()}
            for half_life in half_lives
        }

    def update(self, images: int, batch: int) -> None:
        """Update the averages after a step of `batch` images that began at `images`."""
        weights = [t.detach().float() for t in self.tensors.values()]
        for half_life, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), weights, 1 - decay(half_life, images, batch))

    def load(self, half_life: float, state: dict[str, Tensor]) -> None:
        """Copy the averages of one half-life from `state`."""
        for name, average in self.averages[half_life].items():
            average.copy_(state[name])
