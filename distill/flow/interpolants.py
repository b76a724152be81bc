r"""Interpolants (noise schedules): x_t = alpha(t) data + sigma(t) noise, with independent data and noise ~ N(0, I).

A schedule maps t to alpha, sigma and their derivatives. t lies in [0, 1], from t = 0 (data) to t = 1 (noise). Every
kind of prediction is a linear combination c data + d noise. With x_t it forms the 2x2 system

    | alpha  sigma | | data  |   | x_t        |
    |   c      d   | | noise | = | prediction |          determinant  D = alpha d - sigma c,

To convert a prediction, solve this system for data and noise (`split`), then combine them with the coefficients of the
other kind (`predict`):

    prediction      c         d
    "sample"        1         0
    "epsilon"       0         1
    "v_prediction"  -sigma/n  alpha/n     n = sqrt(alpha^2 + sigma^2)   (Salimans & Ho 2022, arXiv 2202.00512)
    "velocity"      alpha'    sigma'      dx_t/dt, which the framework uses everywhere

At equal sigma/alpha, every schedule has the same data and noise (Karras et al. 2022, arXiv 2206.00364). A change of
schedule therefore needs other coefficients only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from distill.flow.waiting import any_known, on

Prediction = Literal["sample", "epsilon", "v_prediction", "velocity"]


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives with respect to t, all [B]."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def like(t: Tensor, x: Tensor) -> Tensor:
    """Reshapes t [B] to [B, 1, ..., 1], to broadcast over x [B, ...]. Raises ValueError if t has another shape.

    All code broadcasts times by this function, so that a wrong shape is an error instead of a wrong result.
    """
    if t.ndim != 1 or x.ndim < 1 or t.shape[0] != x.shape[0]:
        raise ValueError(
            f"a time must have shape [B] = [{x.shape[0] if x.ndim else '?'}] for x of shape {list(x.shape)}, "
            f"got {list(t.shape)}; expand a scalar with torch.full((B,), t)"
        )
    return t.reshape(-1, *([1] * (x.ndim - 1)))


@dataclass(frozen=True)
class Interpolant:
    """A schedule. path: t [B] -> Coefficients. time_of: the inverse of `ratio`, sigma/alpha [B] -> t [B]."""

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
        """The prediction of `kind` at (data, noise, t): the target of a network that predicts this kind."""
        row_data, row_noise = self._row(t, kind)
        return like(row_data, data) * data + like(row_noise, noise) * noise

    def split(self, x_t: Tensor, prediction: Tensor, t: Tensor, kind: Prediction = "velocity") -> tuple[Tensor, Tensor]:
        """Solves the 2x2 system: x_t and a prediction of `kind` -> (data, noise).

        Raises ValueError if the prediction does not determine the data at t.
        """
        alpha, sigma, _, _ = self.path(t)
        row_data, row_noise = self._row(t, kind)
        determinant = alpha * row_noise - sigma * row_data  # [B]
        if any_known(determinant == 0):
            raise ValueError(f"a {kind} prediction does not determine the data at the given t on the {self.name} path")
        data = like(row_noise / determinant, x_t) * x_t - like(sigma / determinant, x_t) * prediction
        noise = like(alpha / determinant, x_t) * prediction - like(row_data / determinant, x_t) * x_t
        return data, noise

    def convert(self, x_t: Tensor, prediction: Tensor, t: Tensor, kind: Prediction, to: Prediction) -> Tensor:
        """Converts a prediction from `kind` to the kind `to`, at the same (x_t, t)."""
        if kind == to:
            like(t, x_t)  # checks the shape of t
            return prediction
        return self.predict(*self.split(x_t, prediction, t, kind), t, to)

    def ratio(self, t: Tensor) -> Tensor:
        """The noise-to-signal ratio sigma/alpha [B]; infinite if alpha is 0."""
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


@cache
def linear() -> Interpolant:
    """alpha = 1 - t, sigma = t (rectified flow, Liu et al. 2022, arXiv 2209.03003): v = noise - data."""

    def path(t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)

    def time_of(ratio: Tensor) -> Tensor:
        return torch.where(ratio.isinf(), torch.ones_like(ratio), ratio / (1 + ratio))

    return Interpolant("linear", path, time_of)


@cache
def edm() -> Interpolant:
    """alpha = 1, sigma = t / (1 - t): variance exploding with t = sigma / (1 + sigma) (Karras et al. 2022, EDM)."""

    def path(t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(one, t / (1 - t), torch.zeros_like(t), (1 - t).square().reciprocal())

    return Interpolant("edm", path, linear().time_of)


def vp(alphas_cumprod: Tensor) -> Interpolant:
    """The continuous extension of DDPM's discrete schedule: t = n/(N-1), with log(sigma/alpha) linear between entries.

    alphas_cumprod: [N], decreasing, below 1. A last entry of 0 (zero terminal SNR) is treated as 1e-12, so that
    log(sigma/alpha) is finite. The difference is far below the float32 resolution of x_t. Raises ValueError if the
    entries are not like this.
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
        table = on(log_ratio, t.device)
        position = (t.double() * last).clamp(0, last)
        n = position.floor().clamp(max=last - 1).long()
        slope = table[n + 1] - table[n]
        log_r = table[n] + (position - n) * slope
        alpha, sigma = torch.sigmoid(-2 * log_r).sqrt(), torch.sigmoid(2 * log_r).sqrt()
        rate = slope * last  # d log(sigma/alpha) / dt
        coefficients = (alpha, sigma, -alpha * sigma.square() * rate, sigma * alpha.square() * rate)
        return Coefficients(*(c.to(t.dtype) for c in coefficients))

    def time_of(ratio: Tensor) -> Tensor:
        table = on(log_ratio, ratio.device)
        log_r = torch.log(ratio.double()).clamp(table[0], table[-1])
        n = (torch.searchsorted(table, log_r) - 1).clamp(0, last - 1)
        return ((n + (log_r - table[n]) / (table[n + 1] - table[n])) / last).to(ratio.dtype)

    return Interpolant("vp", path, time_of)
