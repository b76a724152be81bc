"""Solving dx/dt = v(x, t, cond) from noise to data, and the straightness of its paths.

A solver of `distill.solvers` takes x at t_grid[0] along t_grid [N+1], decreasing in the field's own time, to t_grid[N].
The field is called with t in float64, the state keeps its dtype. The last time may lie below the field's range: no call
is made there. Solvers that can invert also go from data to noise, along an increasing grid.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from distill.core.errors import InputError
from distill.flow.fields import ROUNDING, Rescheduled, inside, start
from distill.flow.interpolants import like, linear
from distill.flow.times import uniform_grid
from distill.protocols import Cond, VelocityField
from distill.solvers import find_solver
from distill.spec.model import is_path


class FieldOde:
    """The ODE of a field for one condition, as solvers take it. Fits `distill.solvers.Ode`."""

    def __init__(self, field: VelocityField, cond: Cond) -> None:
        self.field, self.cond, self.lowest = field, cond, field.t_range[0]

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """v [B, ...] of x [B, ...], all at one time, in x's dtype."""
        v = self.field(x, _times_of(x, t), self.cond)
        assert v.shape == x.shape, f"a field of shape {list(v.shape)} for x of shape {list(x.shape)}"
        return v.to(x.dtype)

    def data(self, x: Tensor, t: float) -> Tensor:
        """The data [B, ...] that the velocity at x [B, ...] points to."""
        return self.field.interpolant.split(x, self.velocity(x, t), _times_of(x, t))[0].to(x.dtype)

    def path(self, t: float) -> tuple[float, float]:
        """alpha and sigma at t."""
        c = self.field.interpolant.path(torch.tensor([t], dtype=torch.float64))
        return c.alpha.item(), c.sigma.item()


def states(solver: str, field: VelocityField, x: Tensor, t_grid: Tensor, cond: Cond) -> Iterator[Tensor]:
    """The states [B, ...] at t_grid[1:] of the path through x at t_grid[0]."""
    found, ode = find_solver(solver), FieldOde(field, cond)
    times, before = _times(field, t_grid, up=found.calls_inverting is not None), None
    for t, t_next in pairwise(times):
        seen = found.look(ode, x, t)
        x = found.step(ode, x, seen, t, t_next, None if t_next == times[-1] else before)
        before = seen, t
        yield x


def integrate(solver: str, field: VelocityField, x: Tensor, t_grid: Tensor, cond: Cond) -> Tensor:
    """The last of `states`, at the end of the grid."""
    for x_next in states(solver, field, x, t_grid, cond):
        x = x_next
    return x


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


def _solve(field: VelocityField, noise: Tensor, cond: Cond, solver: str, t_grid: Tensor) -> Tensor:
    with torch.no_grad():
        return integrate(solver, field, start(field, noise), t_grid, cond)


def invert(field: VelocityField, data: Tensor, cond: Cond, *, solver: str, steps: int, noise: Tensor) -> Tensor:
    """Data [B, ...] -> the noise [B, ...] from which `solve` would come to it, along the field's ODE.

    Where the field is not defined at t = 0, the path starts at its lowest time, from (1 - t) data + t noise with the
    given noise (Lee et al. 2024, arXiv 2405.20320, do so at t = 0.001).
    """
    field = on_linear_path(field)
    t_min, t_max = field.t_range
    t_grid = torch.linspace(t_min, t_max, steps + 1, dtype=torch.float64)
    x = data if t_min == 0 else (1 - t_min) * data + t_min * noise
    with torch.no_grad():
        x = integrate(solver, field, x, t_grid, cond)
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
    ode, velocities = FieldOde(field, cond), []
    times = _times(field, uniform_grid(steps, t_max, t_min))
    with torch.no_grad():
        for t, t_next in pairwise(times):
            velocities.append(ode.velocity(x, t))
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


def _times_of(x: Tensor, t: float) -> Tensor:
    """One time for all of x: [B]."""
    return torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)
