r"""The one assumption: x_t = alpha(t) data + sigma(t) noise, with data and noise independent and noise ~ N(0, I).

A schedule is t -> (alpha, sigma) with its derivatives, t in [0, 1], t = 0 data, t = 1 noise. Anything a network
may predict is a row c data + d noise, so with x_t it forms the 2x2 system

    | alpha  sigma | | data  |   | x_t        |
    |   c      d   | | noise | = | prediction |          determinant  D = alpha d - sigma c,

and every conversion is one solve of it (`split`) followed by one row (`predict`):

    prediction      c         d
    "sample"        1         0
    "epsilon"       0         1
    "v_prediction"  -sigma/n  alpha/n     n = sqrt(alpha^2 + sigma^2)   (Salimans & Ho 2022, arXiv 2202.00512)
    "velocity"      alpha'    sigma'      dx_t/dt, the framework's own

(data, noise) are the same numbers in every schedule at equal sigma/alpha (Karras et al. 2022, arXiv 2206.00364),
which makes a change of schedule another row, not another formula.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Prediction = Literal["sample", "epsilon", "v_prediction", "velocity"]


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives with respect to t, all [B]."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def like(t: Tensor, x: Tensor) -> Tensor:
    """t [B] -> [B, 1, ..., 1] to broadcast over x [B, ...]. The only way to broadcast a time; refuses other shapes."""
    if t.ndim != 1 or x.ndim < 1 or t.shape[0] != x.shape[0]:
        raise ValueError(
            f"a time must have shape [B] = [{x.shape[0] if x.ndim else '?'}] for x of shape {list(x.shape)}, "
            f"got {list(t.shape)}; expand a scalar with torch.full((B,), t)"
        )
    return t.reshape(-1, *([1] * (x.ndim - 1)))


@dataclass(frozen=True)
class Interpolant:
    """A schedule. `path`: t [B] -> Coefficients; `time_of`: sigma/alpha [B] -> t [B], its inverse."""

    name: str
    path: Callable[[Tensor], Coefficients]
    time_of: Callable[[Tensor], Tensor]

    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha data + sigma noise."""
        c = self.path(t)
        return like(c.alpha, data) * data + like(c.sigma, noise) * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt = alpha' data + sigma' noise."""
        return self.predict(data, noise, t, "velocity")

    def predict(self, data: Tensor, noise: Tensor, t: Tensor, kind: Prediction) -> Tensor:
        """The row of `kind`: what a network of that kind should output at (data, noise, t)."""
        row_data, row_noise = self._row(t, kind)
        return like(row_data, data) * data + like(row_noise, noise) * noise

    def split(self, x_t: Tensor, prediction: Tensor, t: Tensor, kind: Prediction = "velocity") -> tuple[Tensor, Tensor]:
        """(x_t, prediction of `kind`) -> (data, noise): the 2x2 solve."""
        alpha, sigma, _, _ = self.path(t)
        row_data, row_noise = self._row(t, kind)
        determinant = alpha * row_noise - sigma * row_data  # [B]
        if (determinant == 0).any():
            raise ValueError(f"a {kind} prediction does not determine the data at the given t on the {self.name} path")
        data = like(row_noise / determinant, x_t) * x_t - like(sigma / determinant, x_t) * prediction
        noise = like(alpha / determinant, x_t) * prediction - like(row_data / determinant, x_t) * x_t
        return data, noise

    def convert(self, x_t: Tensor, prediction: Tensor, t: Tensor, kind: Prediction, to: Prediction) -> Tensor:
        """A prediction of one kind as another, at the same (x_t, t)."""
        if kind == to:
            like(t, x_t)  # a wrong t is refused here too
            return prediction
        return self.predict(*self.split(x_t, prediction, t, kind), t, to)

    def ratio(self, t: Tensor) -> Tensor:
        """sigma/alpha, the noise-to-signal ratio [B]; infinite where alpha is 0."""
        c = self.path(t)
        return c.sigma / c.alpha

    def _row(self, t: Tensor, kind: Prediction) -> tuple[Tensor, Tensor]:
        alpha, sigma, d_alpha, d_sigma = self.path(t)
        if kind == "velocity":
            return d_alpha, d_sigma
        if kind == "v_prediction":
            norm = (alpha.square() + sigma.square()).sqrt()
            return -sigma / norm, alpha / norm
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        return (one, zero) if kind == "sample" else (zero, one)


def linear() -> Interpolant:
    """alpha = 1 - t, sigma = t (rectified flow, Liu et al. 2022, arXiv 2209.03003): v = noise - data."""

    def path(t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)

    def time_of(ratio: Tensor) -> Tensor:
        return torch.where(ratio.isinf(), torch.ones_like(ratio), ratio / (1 + ratio))

    return Interpolant("linear", path, time_of)


def edm() -> Interpolant:
    """alpha = 1, sigma = t / (1 - t): variance exploding with t = sigma / (1 + sigma) (Karras et al. 2022, EDM)."""

    def path(t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(one, t / (1 - t), torch.zeros_like(t), (1 - t).square().reciprocal())

    return Interpolant("edm", path, linear().time_of)


def vp(alphas_cumprod: Tensor) -> Interpolant:
    """DDPM's discrete schedule made continuous: t = n/(N-1), log(sigma/alpha) linear in n between the N entries.

    alphas_cumprod: [N], decreasing in (0, 1). A zero terminal SNR (last entry 0) keeps log(sigma/alpha) finite by
    treating the last entry as 1e-12, far below float32's resolution of x_t.
    """
    cumulative = alphas_cumprod.detach().to("cpu", torch.float64)
    decreasing = (
        cumulative.ndim == 1 and cumulative.numel() > 1 and bool((cumulative.clamp(min=1e-12).diff() < 0).all())
    )
    if not decreasing or cumulative[0] >= 1 or cumulative[-1] < 0:
        raise ValueError(f"alphas_cumprod must be [N >= 2], decreasing, below 1; got shape {list(cumulative.shape)}")
    cumulative = cumulative.clamp(min=1e-12)
    log_ratio = 0.5 * (torch.log1p(-cumulative) - torch.log(cumulative))  # [N], increasing
    last = log_ratio.numel() - 1

    def path(t: Tensor) -> Coefficients:
        table = log_ratio.to(t.device)
        position = (t.double() * last).clamp(0, last)
        n = position.floor().clamp(max=last - 1).long()
        slope = table[n + 1] - table[n]
        log_r = table[n] + (position - n) * slope
        alpha, sigma = torch.sigmoid(-2 * log_r).sqrt(), torch.sigmoid(2 * log_r).sqrt()
        rate = slope * last  # d log(sigma/alpha) / dt
        coefficients = (alpha, sigma, -alpha * sigma.square() * rate, sigma * alpha.square() * rate)
        return Coefficients(*(c.to(t.dtype) for c in coefficients))

    def time_of(ratio: Tensor) -> Tensor:
        table = log_ratio.to(ratio.device)
        log_r = torch.log(ratio.double()).clamp(table[0], table[-1])
        n = (torch.searchsorted(table, log_r) - 1).clamp(0, last - 1)
        return ((n + (log_r - table[n]) / (table[n + 1] - table[n])) / last).to(ratio.dtype)

    return Interpolant("vp", path, time_of)
