"""Solves the ODE dx/dt = v(x, t, cond) between noise and data, and measures the straightness of its paths.

A solver of `distill.solvers` integrates x from t_grid[0] to t_grid[N] along t_grid [N+1], decreasing times in the
field's own schedule. The field is called with t in float64, and x keeps its dtype. The last time may be below the
field's range, because the field is not called there. Solvers that support inversion also integrate from data to noise,
along an increasing grid.
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
from distill.solvers import Step, find_solver
from distill.spec.model import is_path


class FieldOde:
    """The ODE of a field for one batch of conditions. Implements `distill.solvers.Ode`.

    fresh: the noises [B, ...] that a stochastic solver takes along the paths.
    """

    def __init__(self, field: VelocityField, cond: Cond, fresh: Sequence[Tensor] = ()) -> None:
        self.field, self.cond, self.fresh = field, cond, fresh
        self.lowest, self.highest = field.t_range

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """The velocity at x [B, ...], with one time for all samples, in the dtype of x."""
        v = self.field(x, _times_of(x, t), self.cond)
        assert v.shape == x.shape, f"the field has shape {list(v.shape)}, but x has shape {list(x.shape)}"
        return v.to(x.dtype)

    def data(self, x: Tensor, t: float) -> Tensor:
        """The data prediction [B, ...] that corresponds to the velocity at x [B, ...]."""
        return self.field.interpolant.split(x, self.velocity(x, t), _times_of(x, t))[0].to(x.dtype)

    def path(self, t: float) -> tuple[float, float]:
        """alpha and sigma at t."""
        c = self.field.interpolant.path(torch.tensor([t], dtype=torch.float64))
        return c.alpha.item(), c.sigma.item()

    def time(self, ratio: float) -> float:
        """The time at which sigma/alpha has this value."""
        return self.field.interpolant.time_of(torch.tensor([ratio], dtype=torch.float64)).item()

    def noise(self, x: Tensor, k: int) -> Tensor:
        """Noise k of the path, in the dtype of x [B, ...]."""
        return self.fresh[k].to(x.dtype)


def states(
    solver: str, field: VelocityField, x: Tensor, t_grid: Tensor, cond: Cond, fresh: Sequence[Tensor] = ()
) -> Iterator[Tensor]:
    """Yields the states [B, ...] at t_grid[1:] of the path that starts from x [B, ...] at t_grid[0].

    fresh: for a stochastic solver, as many standard normal noises [B, ...] as its `noises` says. Raises ValueError for
    another number of them.
    """
    found, ode = find_solver(solver), FieldOde(field, cond, fresh)
    times = _times(field, t_grid, up=found.calls_inverting is not None)
    steps, to_data = len(times) - 1, ode.path(times[-1])[1] == 0
    if (needed := found.noises(steps) if found.noises else 0) != len(fresh):
        raise ValueError(f"{solver} takes {needed} noises in {steps} steps, got {len(fresh)}")
    past: tuple[tuple[Tensor, float], ...] = ()
    uncorrected: tuple[Tensor, Tensor, Step] | None = None  # the last step's beginning, what was seen there, the step
    for i, (t, t_next) in enumerate(pairwise(times)):
        seen = found.look(ode, x, t)
        if found.correct is not None and uncorrected is not None:
            x = found.correct(ode, *uncorrected, seen)
            yield x
        at = Step(t, t_next, past, steps - i, to_data, times)
        uncorrected, x = (x, seen, at), found.step(ode, x, seen, at)
        if found.correct is None or at.left == 1:
            yield x
        past = ((seen, t), *past)[: found.memory]


def integrate(
    solver: str, field: VelocityField, x: Tensor, t_grid: Tensor, cond: Cond, fresh: Sequence[Tensor] = ()
) -> Tensor:
    """Returns the last of `states` [B, ...], at the end of the grid."""
    for x_next in states(solver, field, x, t_grid, cond, fresh):
        x = x_next
    return x


def solve(
    field: VelocityField, noise: Tensor, cond: Cond, *, solver: str, steps: int, fresh: Sequence[Tensor] = ()
) -> Tensor:
    """Solves the ODE from noise [B, ...] to data [B, ...] on a uniform grid of linear-path time, without gradients.

    fresh: see `states`.
    """
    field = on_linear_path(field)
    return _solve(field, noise, cond, solver, _uniform(field, steps), fresh)


def solve_along(field: VelocityField, noise: Tensor, cond: Cond, *, solver: str, times: Sequence[float]) -> Tensor:
    """Like `solve`, but along the given times of the linear path, which decrease from 1 to 0.

    The first time, 1, stands for the noisiest time at which the field is defined. Raises InputError if an inner time is
    outside the field's range.
    """
    field = on_linear_path(field)
    t_min, t_max = field.t_range
    inner = times[1:-1]
    if not is_path(times) or not all(t_min - ROUNDING <= t < t_max for t in inner):
        raise InputError(
            f"times {', '.join(f'{t:g}' for t in times)}: must decrease from 1 to 0; times in between must be less "
            f"than {t_max:.4g} and at least {t_min:.4g}, where the teacher's velocity is defined"
        )
    return _solve(field, noise, cond, solver, torch.tensor([t_max, *inner, 0.0], dtype=torch.float64))


def grid_of(field: VelocityField, steps: int, times: Sequence[float] | None = None) -> list[float]:
    """The linear-path times along which `solve`, or with `times` `solve_along`, solves the ODE."""
    field = on_linear_path(field)
    return _uniform(field, steps).tolist() if times is None else [field.t_range[1], *times[1:]]


def inverting_grid(field: VelocityField, steps: int) -> list[float]:
    """The linear-path times along which `invert` solves the ODE."""
    t_min, t_max = on_linear_path(field).t_range
    return torch.linspace(t_min, t_max, steps + 1, dtype=torch.float64).tolist()


def _uniform(field: VelocityField, steps: int) -> Tensor:
    t_min, t_max = field.t_range
    return uniform_grid(steps, t_max, t_min)


def _solve(
    field: VelocityField, noise: Tensor, cond: Cond, solver: str, t_grid: Tensor, fresh: Sequence[Tensor] = ()
) -> Tensor:
    with torch.no_grad():
        return integrate(solver, field, start(field, noise), t_grid, cond, fresh)


def invert(field: VelocityField, data: Tensor, cond: Cond, *, solver: str, steps: int, noise: Tensor) -> Tensor:
    """Inverts `solve`: solves the ODE from data [B, ...] to noise [B, ...], on a uniform grid, without gradients.

    If the field is not defined at t = 0, the path starts at its lowest time t, from (1 - t) data + t noise with the
    given noise (Lee et al. 2024, arXiv 2405.20320, start at t = 0.001).
    """
    field = on_linear_path(field)
    t_min = field.t_range[0]
    t_grid = torch.tensor(inverting_grid(field, steps), dtype=torch.float64)
    x = data if t_min == 0 else (1 - t_min) * data + t_min * noise
    with torch.no_grad():
        x = integrate(solver, field, x, t_grid, cond)
    return x / start(field, torch.ones((), dtype=torch.float64)).item()


def step(
    field: VelocityField, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond, solver: Literal["euler", "midpoint", "heun"]
) -> Tensor:
    """Makes one solver step per sample, from its own time t to its own time s <= t, both [B]. Returns x_s [B, ...]."""
    gap, v = like(s - t, x_t), field(x_t, t, cond)
    if solver == "midpoint":
        return x_t + gap * field(x_t + gap / 2 * v, (t + s) / 2, cond)
    x_s = x_t + gap * v
    return x_s if solver == "euler" else x_t + gap * (v + field(x_s, s, cond)) / 2


def march(
    field: VelocityField, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond, solver: Literal["euler", "heun"], steps: int
) -> Tensor:
    """Like `step`, but with `steps` equal steps from t to s."""
    times = [torch.lerp(t, s, i / steps) for i in range(steps + 1)]
    for now, then in pairwise(times):
        x_t = step(field, x_t, now, then, cond, solver)
    return x_t


def straightness(field: VelocityField, noise: Tensor, cond: Cond, steps: int) -> float:
    """The straightness S_N of the paths from noise [B, ...] (Liu et al. 2022, arXiv 2209.03003, eq. 8); 0: straight.

    S_N is the mean square of the velocity minus the mean velocity of its path. The mean is over time, in N = `steps`
    Euler steps on a uniform grid of linear-path time, and over all elements of the batch.
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
    """Returns the field, with its ODE converted to the time and scale of the linear path if it has another schedule."""
    return field if field.interpolant.name == "linear" else Rescheduled(field, linear())


def _times(field: VelocityField, t_grid: Tensor, *, up: bool = False) -> list[float]:
    """Checks a time grid and returns it as a list. up: allow increasing grids too (from data to noise)."""
    steps = t_grid.diff()
    if t_grid.ndim != 1 or t_grid.numel() < 2 or not ((steps < 0).all() or (up and (steps > 0).all())):
        ways = "increasing or decreasing" if up else "decreasing"
        raise ValueError(f"t_grid must be [N+1 >= 2] and {ways}, got {t_grid.tolist()}")
    inside(t_grid[:-1].double(), field.t_range)
    return t_grid.double().tolist()


def _times_of(x: Tensor, t: float) -> Tensor:
    """Repeats t for each sample of x: [B] float64."""
    return torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)
