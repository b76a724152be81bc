"""Bespoke scale-time solvers (Shaul et al. 2023, arXiv 2310.19075): Euler or midpoint steps in a fitted time and scale.

With r from 0 (noise) to 1 (data), k_r x(t_r) is the solution of another ODE, on which Euler or midpoint steps are made.
t, k and their derivatives are free at the ends of the steps, and for the midpoint rule half-way between them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.protocols import Cond, VelocityField

from .fitted import Fitted, Paths

UPDATES, LEARNING_RATE = 100, 0.02


@dataclass(frozen=True)
class ScaleTime:
    """t [P + 1] from 1 to 0, k [P + 1] > 0, and their derivatives dt < 0 and dk by r, at P + 1 evenly spaced places."""

    t: Tensor
    dt: Tensor
    k: Tensor
    dk: Tensor


Loss = Callable[[Paths, ScaleTime, bool], Tensor]


def fit_bespoke(known: Paths, steps: int, *, midpoint: bool, loss: Loss) -> Fitted:
    """Fits all numbers at once (Adam, each update on a quarter of the paths)."""
    theta = unchanged(2 * steps if midpoint else steps).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=LEARNING_RATE, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    for i in range(UPDATES):
        with torch.enable_grad():
            (theta.grad,) = torch.autograd.grad(loss(known.quarter(i), scale_time(theta), midpoint), theta)
        optimizer.step()
        decay.step()
    at = scale_time(theta.detach())
    return lambda field, noise, cond: bespoke(field, noise, cond, at, midpoint)


def scale_time(theta: Tensor) -> ScaleTime:
    """From any numbers [4, P]. k is 1 at the first place; the derivatives at the last are not used."""
    zero = theta.new_zeros(1)
    t = 1 - torch.cat([zero, (theta[0].abs() / theta[0].abs().sum()).cumsum(0)])
    dt, k, dk = torch.cat([-theta[1].abs(), zero]), torch.cat([zero, theta[2]]).exp(), torch.cat([theta[3], zero])
    return ScaleTime(t, dt, k, dk)


def unchanged(places: int) -> Tensor:
    """The numbers [4, P] of t = 1 - r and k = 1."""
    return torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)[:, None].repeat(1, places)


def bespoke(field: VelocityField, noise: Tensor, cond: Cond, at: ScaleTime, midpoint: bool) -> Tensor:
    x = noise[None]
    for i in range(0, len(at.t) - 1, 2 if midpoint else 1):
        x = advanced(field, x, cond, at, torch.tensor([i]), midpoint)
    return x[0]


def advanced(field: VelocityField, x: Tensor, cond: Cond, at: ScaleTime, i: Tensor, midpoint: bool) -> Tensor:
    """One step from each of the places i [N], from states [N, B, ...]."""

    def of(values: Tensor, places: Tensor) -> Tensor:
        return values[places].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

    stride = 2 if midpoint else 1
    h, m, end = stride / (len(at.t) - 1), i + 1, i + stride
    k, dk, dt, k_m, dk_m, dt_m = (of(values, places) for places in (i, m) for values in (at.k, at.dk, at.dt))
    slope = dk * x + k * dt * velocity(field, x, at.t[i], cond)
    if midpoint:
        z = k * x + h / 2 * slope
        slope = dk_m / k_m * z + k_m * dt_m * velocity(field, z / k_m, at.t[m], cond)
    return (k * x + h * slope) / of(at.k, end)


def velocity(field: VelocityField, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """For x [N, B, ...] at times t [N], all in one call."""
    rows = {name: value.repeat(len(x), *[1] * (value.ndim - 1)) for name, value in cond.items()}
    return field(x.flatten(0, 1), t.repeat_interleave(x.shape[1]), rows).to(x.dtype).unflatten(0, x.shape[:2])


def bound(known: Paths, at: ScaleTime, midpoint: bool) -> Tensor:
    """The loss of the paper: the mean over samples of a bound of the error at the end, from the errors of single steps.

    Each step begins on the reference path. Its error is multiplied by how much later steps can amplify it, if the
    velocity has the Lipschitz constant 1.
    """
    stride = 2 if midpoint else 1
    places = torch.arange(0, len(at.t), stride)
    begin, end = places[:-1], places[1:]
    x = known.between(at.t[places])  # [N + 1, B, ...]
    wrong = advanced(known.field, x[:-1], known.cond, at, begin, midpoint) - x[1:]
    rms = (wrong.double().flatten(2).square().mean(2) + 1e-20).sqrt()  # [N, B]
    h, rate = stride / (len(at.t) - 1), at.dk.abs() / at.k + at.dt.abs()
    growth = 1 + h * rate[begin + 1] * (1 + h / 2 * rate[begin]) if midpoint else 1 + h * rate[begin]
    growth = growth * at.k[begin] / at.k[end]
    later = torch.cat([growth[1:].flip(0).cumprod(0).flip(0), growth.new_ones(1)])
    return (later[:, None] * rms).sum(0).mean()


def at_end(known: Paths, at: ScaleTime, midpoint: bool) -> Tensor:
    """Another loss, that of BNS solvers: the log of the mean square error of the samples."""
    samples = bespoke(known.field, known.noise, known.cond, at, midpoint)
    return (samples - known.states[-1]).double().square().mean().log()
