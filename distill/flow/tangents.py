"""Tangents of consistency in continuous time: how the average velocity u(x_t, t, 0) should change.

The end f = x_t - t u of a path changes along a path of velocity v by df/dt = -((u - v) + t Du), where Du is the
derivative of u along (v, 1, 0). All functions return a step in the units of u, which the loss subtracts from u. Times
t are [B], the other tensors [B, ...].
"""

import math

import torch
from torch import Tensor, nn

from distill.flow.interpolants import like

NORM = 0.1  # c in g / (|g| + c), as in the paper


def trig(u: Tensor, v: Tensor, du: Tensor, t: Tensor, factor: float, sigma_data: float) -> tuple[Tensor, Tensor]:
    """The tangent of TrigFlow (Lu & Song 2024, arXiv 2410.11081), normalised, and dF/du [B].

    With th = atan(sigma / sigma_data), it is g = -cos^2(th) (sd F - dx/dth) - factor cos(th) sin(th) (x + sd DF/dth) of
    their network F, in terms of u: for q^2 = sd^2 (1 - t)^2 + t^2, F is u q / sd and what depends on x_t and t alone.
    """
    at = like(t, u)
    scale = sigma_data**2 * (1 - at)
    q = (scale * (1 - at) + at.square()).sqrt()
    velocity = (scale + factor * at * (at - scale)) / q  # q, if factor is 1
    g = (1 - at) * (velocity * (u - v) + factor * q * at * du)
    slope = (q / sigma_data).flatten()
    return normalised(g) / like(slope, u), slope


def linear(u: Tensor, v: Tensor, du: Tensor, t: Tensor, factor: float) -> Tensor:
    """The tangent of the linear path, normalised; factor: of the derivative."""
    return normalised(u - v + factor * like(t, u) * du)


def clipped(u: Tensor, v: Tensor, du: Tensor, t: Tensor) -> Tensor:
    """The tangent of FACM (Peng et al. 2025, arXiv 2507.03738): clipped to [-1, 1], and smaller near the data."""
    at = like(t, u)
    return (1 - (1 - at).sqrt()) * (u - v + at * du).clamp(-1, 1)


def normalised(g: Tensor) -> Tensor:
    """g / (|g| + 0.1), where |g| is the root of the mean square of a sample."""
    return g / (like(g.square().flatten(1).mean(1).sqrt(), g) + NORM)


class LogVariance(nn.Module):
    """A function of t in (0, 1) that is learned, [B] -> [B]. It is 0 at first."""

    WAVES = 8
    WIDEST = 10.0  # logit(t) at the ends of the range on which the waves differ

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(self.WAVES))

    def forward(self, t: Tensor) -> Tensor:
        angle = math.pi / 2 * (1 + t.logit() / self.WIDEST)
        waves = angle[:, None] * torch.arange(self.WAVES, device=t.device, dtype=t.dtype)
        return (waves.cos() * self.weight).sum(1)
