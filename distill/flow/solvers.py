"""Solvers of dx/dt = v(x, t, cond) from noise to data, and the straightness of its paths.

A solver takes x at t_grid[0] along t_grid [N+1], decreasing in the field's own time, to t_grid[N]. The field is called
with t in float64, the state keeps its dtype. The last time may lie below the field's range: no call is made there.
Euler and Heun also go from data to noise, along an increasing grid.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from distill.core.errors import InputError
from distill.core.text import suggest
from distill.flow.fields import ROUNDING, Rescheduled, inside, start
from distill.flow.interpolants import like, linear
from distill.flow.times import uniform_grid
from distill.protocols import Cond, VelocityField
from distill.spec.model import is_path


@dataclass(frozen=True)
class Solver:
    """`solver(field, x, t_grid, cond)` is the end of the path [B, ...], `solver.path(...)` its states at t_grid[1:]."""

    path: Callable[[VelocityField, Tensor, Tensor, Cond], Iterator[Tensor]]
    order: int
    """of convergence"""

    def __call__(self, field: VelocityField, x: Tensor, t_grid: Tensor, cond: Cond) -> Tensor:
        for x_next in self.path(field, x, t_grid, cond):
            x = x_next
        return x


def _euler(field: VelocityField, x: Tensor, t_grid: Tensor, cond: Cond) -> Iterator[Tensor]:
    """x <- x + (t_next - t) v. On the linear path this is DDIM (Song et al. 2020, arXiv 2010.02502)."""
    for t, t_next in pairwise(_times(field, t_grid, up=True)):
        x = x + (t_next - t) * velocity(field, x, t, cond)
        yield x


def _heun(field: VelocityField, x: Tensor, t_grid: Tensor, cond: Cond) -> Iterator[Tensor]:
    """The trapezoidal rule on an Euler step (Karras et al. 2022, arXiv 2206.00364, alg. 1).

    A step to sigma = 0, or to below the field's range, is Euler's: one such step keeps the order of the whole.
    """
    for t, t_next in pairwise(_times(field, t_grid, up=True)):
        x = heun_step(field, x, velocity(field, x, t, cond), t, t_next, cond)
        yield x


def heun_step(field: VelocityField, x: Tensor, v: Tensor, t: float, t_next: float, cond: Cond) -> Tensor:
    """One step of `heun` by v, the velocity of x [B, ...] at t."""
    x_next = x + (t_next - t) * v
    if t_next >= field.t_range[0] and _coefficients(field, t_next)[1] > 0:
        x_next = x + (t_next - t) * (v + velocity(field, x_next, t_next, cond)) / 2
    return x_next


def _dpm_solver_pp_2m(field: VelocityField, x: Tensor, t_grid: Tensor, cond: Cond) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, alg. 2): multistep in lambda = ln(alpha/sigma).

    First and last step are of first order. On a uniform grid of t between noise and data the error is h^2 ln(1/h), not
    h^2: near them the steps in lambda do not become small.
    """
    times, before = _times(field, t_grid), None
    for t, t_next in pairwise(times):
        data = data_of(field, x, t, cond)
        x = multistep(field, x, data, t, t_next, None if t_next == times[-1] else before)
        before = data, t
        yield x


def data_of(field: VelocityField, x: Tensor, t: float, cond: Cond) -> Tensor:
    """The data [B, ...] that the velocity at x [B, ...] points to."""
    at_t = torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)
    return field.interpolant.split(x, velocity(field, x, t, cond), at_t)[0].to(x.dtype)


def multistep(
    field: VelocityField, x: Tensor, data: Tensor, t: float, t_next: float, before: tuple[Tensor, float] | None
) -> Tensor:
    """A step of DPM-Solver++(2M) by `data_of` x, and by what it was at the time `before`; None: of first order.

    With e^-h = (alpha sigma_next)/(sigma alpha_next) nothing diverges where lambda does (alpha = 0 at pure noise,
    sigma = 0 at data).
    """
    (alpha, sigma), (alpha_next, sigma_next) = _coefficients(field, t), _coefficients(field, t_next)
    if before is not None and not math.isinf(h_prev := _h(field, before[1], t)):
        data = data + _h(field, t, t_next) / (2 * h_prev) * (data - before[0])
    return (sigma_next / sigma) * x + (alpha_next - alpha * sigma_next / sigma) * data


euler, heun, dpm_solver_pp_2m = Solver(_euler, 1), Solver(_heun, 2), Solver(_dpm_solver_pp_2m, 2)
SOLVERS = {"euler": euler, "heun": heun, "dpm_solver_pp_2m": dpm_solver_pp_2m}


def solve(field: VelocityField, noise: Tensor, cond: Cond, *, solver: str, steps: int) -> Tensor:
    """Noise [B, ...] -> data [B, ...] along the field's ODE, on a uniform grid of linear time, without gradients."""
    field = on_linear_path(field)
    t_min, t_max = field.t_range
    return _solve(field, noise, cond, solver, uniform_grid(steps, t_max, t_min))


def solve_along(field: VelocityField, noise: Tensor, cond: Cond, *, solver: str, times: Sequence[float]) -> Tensor:
    """As `solve`, along these linear times. The first, 1, means the noisiest time at which the field is defined."""
    field = on_linear_path(field)
    t_min, t_max = field.t_range
    inner = times[1:-1]
    if not is_path(times) or not all(t_min - ROUNDING <= t < t_max for t in inner):
        raise InputError(
            f"times {', '.join(f'{t:g}' for t in times)}: they must fall from 1 to 0, those between from below "
            f"{t_max:.4g} to {t_min:.4g}, where the velocity is known"
        )
    return _solve(field, noise, cond, solver, torch.tensor([t_max, *inner, 0.0], dtype=torch.float64))


def known(solver: str) -> Solver:
    """The solver of that name."""
    if solver not in SOLVERS:
        raise InputError(f"unknown solver '{solver}': {suggest(solver, SOLVERS)}")
    return SOLVERS[solver]


def _solve(field: VelocityField, noise: Tensor, cond: Cond, solver: str, t_grid: Tensor) -> Tensor:
    with torch.no_grad():
        return known(solver)(field, start(field, noise), t_grid, cond)


def invert(
    field: VelocityField, data: Tensor, cond: Cond, *, solver: Literal["euler", "heun"], steps: int, noise: Tensor
) -> Tensor:
    """Data [B, ...] -> the noise [B, ...] from which `solve` would come to it, along the field's ODE.

    Where the field is not defined at t = 0, the path starts at its lowest time, from (1 - t) data + t noise with the
    given noise (Lee et al. 2024, arXiv 2405.20320, do so at t = 0.001).
    """
    field = on_linear_path(field)
    t_min, t_max = field.t_range
    t_grid = torch.linspace(t_min, t_max, steps + 1, dtype=torch.float64)
    x = data if t_min == 0 else (1 - t_min) * data + t_min * noise
    with torch.no_grad():
        x = SOLVERS[solver](field, x, t_grid, cond)
    return x / start(field, torch.ones((), dtype=torch.float64)).item()


def step(
    field: VelocityField, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond, solver: Literal["euler", "heun"]
) -> Tensor:
    """x_s [B, ...] by one step of each sample from its own t to its own s <= t, both [B]."""
    gap, v = like(s - t, x_t), field(x_t, t, cond)
    x_s = x_t + gap * v
    return x_s if solver == "euler" else x_t + gap * (v + field(x_s, s, cond)) / 2


def march(
    field: VelocityField, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond, solver: Literal["euler", "heun"], steps: int
) -> Tensor:
    """x_s [B, ...] by `steps` equal steps of each sample from its own t to its own s <= t, both [B]."""
    times = [torch.lerp(t, s, i / steps) for i in range(steps + 1)]
    for now, then in pairwise(times):
        x_t = step(field, x_t, now, then, cond, solver)
    return x_t


def straightness(field: VelocityField, noise: Tensor, cond: Cond, steps: int) -> float:
    """S_N, the mean square of v minus the mean velocity of its path (Liu et al. 2022, arXiv 2209.03003, eq. 8).

    Over N Euler steps of equal length in linear time and over the elements of noise [B, ...]; 0: straight paths.
    """
    field = on_linear_path(field)
    t_min, t_max = field.t_range
    x = first = start(field, noise)
    velocities = []
    times = _times(field, uniform_grid(steps, t_max, t_min))
    with torch.no_grad():
        for t, t_next in pairwise(times):
            velocities.append(velocity(field, x, t, cond))
            x = x + (t_next - t) * velocities[-1]
    mean_velocity = (first - x) / t_max
    squares = [(v - mean_velocity).double().square().mean().item() for v in velocities]
    return sum((t - t_next) / t_max * s for (t, t_next), s in zip(pairwise(times), squares, strict=True))


def on_linear_path(field: VelocityField) -> VelocityField:
    """The field, its ODE in the time and scale of the linear path."""
    return field if field.interpolant.name == "linear" else Rescheduled(field, linear())


def _times(field: VelocityField, t_grid: Tensor, *, up: bool = False) -> list[float]:
    """The times of a grid. up: one from data to noise will do too."""
    steps = t_grid.diff()
    if t_grid.ndim != 1 or t_grid.numel() < 2 or not ((steps < 0).all() or (up and (steps > 0).all())):
        ways = "increasing or decreasing" if up else "decreasing"
        raise ValueError(f"t_grid must be [N+1 >= 2] and {ways}, got {t_grid.tolist()}")
    inside(t_grid[:-1].double(), field.t_range)
    return t_grid.double().tolist()


def velocity(field: VelocityField, x: Tensor, t: float, cond: Cond) -> Tensor:
    """v [B, ...] of x [B, ...], all at one time, in x's dtype."""
    v = field(x, torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device), cond)
    assert v.shape == x.shape, f"a field of shape {list(v.shape)} for x of shape {list(x.shape)}"
    return v.to(x.dtype)


def _h(field: VelocityField, t: float, t_next: float) -> float:
    """The step in lambda = ln(alpha/sigma)."""
    (alpha, sigma), (alpha_next, sigma_next) = _coefficients(field, t), _coefficients(field, t_next)
    return math.inf if alpha * sigma_next == 0 else math.log((alpha_next * sigma) / (alpha * sigma_next))


def _coefficients(field: VelocityField, t: float) -> tuple[float, float]:
    c = field.interpolant.path(torch.tensor([t], dtype=torch.float64))
    return c.alpha.item(), c.sigma.item()
