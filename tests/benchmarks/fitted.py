"""Solvers with a few numbers that are fitted to reference paths of one field: IIA and DC-Solver.

All fields are on the linear path, all grids uniform. The paths of a fit start from other noises than those of the test.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from distill.flow.solvers import FieldOde, integrate, states
from distill.flow.times import uniform_grid
from distill.protocols import Cond, VelocityField
from distill.solvers import Step, _unipc

from .multistep import times_of

FINE = 240  # steps of the reference paths
Fitted = Callable[[VelocityField, Tensor, Cond], Tensor]  # (field, noise, cond) -> samples


@dataclass(frozen=True)
class Paths:
    """Reference paths of a field: `states` [FINE + 1, B, ...] from noise to data at evenly spaced times."""

    field: VelocityField
    cond: Cond
    states: Tensor

    @property
    def noise(self) -> Tensor:
        return self.states[0]

    def at(self, t: float) -> Tensor:
        """The states [B, ...] at t."""
        return self.between(torch.tensor([t], dtype=torch.float64))[0]

    def between(self, t: Tensor) -> Tensor:
        """The states [N, B, ...] at times t [N], interpolated linearly, and thus as a function of t."""
        low = ((1 - t.detach()) * FINE).long().clamp(0, FINE - 1)
        place = ((1 - t) * FINE - low).to(self.states.dtype).reshape(-1, *[1] * (self.states.ndim - 1))
        return torch.lerp(self.states[low], self.states[low + 1], place)

    def quarter(self, i: int) -> "Paths":
        """Every fourth path, from the path i mod 4 on."""
        rows = slice(i % 4, None, 4)
        return Paths(self.field, {name: value[rows] for name, value in self.cond.items()}, self.states[:, rows])


def paths(field: VelocityField, noise: Tensor, cond: Cond) -> Paths:
    """By Heun's method."""
    with torch.no_grad():
        found = states("heun", field, noise, uniform_grid(FINE, 1.0, 0.0), cond)
        return Paths(field, cond, torch.stack([noise, *found]))


# --- IIA (Zhang et al. 2023, arXiv 2304.11128): DDIM and fitted multiples of what was seen ---

Seen = Sequence[tuple[float, Tensor, Tensor]]  # (t, x, v) of each step so far, the latest last
Basis = Callable[[Seen], list[Tensor]]
Weigh = Callable[[Seen, float, Tensor, Tensor], Tensor]  # (seen, next time, x after DDIM, basis [K, B, ...]) -> [K]


def changes(seen: Seen) -> list[Tensor]:
    """The changes of the predictions of data and of noise since the step before, as in IIA; none in the first step."""
    if len(seen) == 1:
        return []
    (t_1, x_1, v_1), (t, x, v) = seen[-2:]
    return [x - t * v - (x_1 - t_1 * v_1), x + (1 - t) * v - (x_1 + (1 - t_1) * v_1)]


def everything(seen: Seen) -> list[Tensor]:
    """The state and all velocities: any solver with one call per step, except that its times are fixed."""
    return [seen[-1][1], *(v for _, _, v in seen)]


def fit_linear(known: Paths, steps: int, *, basis: Basis, to_path: bool) -> Fitted:
    """Weights of a basis by least squares, step by step, each step from the state that the ones before it lead to.

    to_path: the target is the state of the reference path. Otherwise it is an accurate solution of the step from its
    own x, as in IIA.
    """
    weights = list[Tensor]()

    def fit(seen: Seen, t_next: float, ddim: Tensor, found: Tensor) -> Tensor:
        t, x, _ = seen[-1]
        times = torch.linspace(t, t_next, 6, dtype=torch.float64)
        goal = known.at(t_next) if to_path else integrate("heun", known.field, x, times, known.cond)
        columns, right = found.double().flatten(1).T, (goal - ddim).double().flatten()
        weights.append(torch.linalg.lstsq(columns, right[:, None]).solution[:, 0])
        return weights[-1]

    def sample(field: VelocityField, noise: Tensor, cond: Cond) -> Tensor:
        left = iter(weights)
        return _linear(field, noise, cond, steps, basis, lambda *_: next(left))

    _linear(known.field, known.noise, known.cond, steps, basis, fit)
    return sample


def _linear(field: VelocityField, noise: Tensor, cond: Cond, steps: int, basis: Basis, weigh: Weigh) -> Tensor:
    ode, x, seen = FieldOde(field, cond), noise, list[tuple[float, Tensor, Tensor]]()
    for t, t_next in pairwise(times_of(steps)):
        v = ode.velocity(x, t)
        seen.append((t, x, v))
        x = x + (t_next - t) * v
        if found := basis(seen):
            stacked = torch.stack(found)
            x = x + torch.einsum("k,k...->...", weigh(seen, t_next, x, stacked).to(x.dtype), stacked)
    return x


# --- DC-Solver (Zhao et al. 2024, arXiv 2409.03755): UniPC-2 whose newest prediction is moved along the path ---

Advance = Callable[[float], list[Tensor]]  # a ratio -> the states at the end of the step, [predicted, corrected]


def fit_dc(known: Paths, steps: int, *, changed: bool) -> Fitted:
    """A ratio for each step from the third on, in [0.5, 1.5], one after the other; 1 changes nothing.

    The error is that of the corrected state from the reference path, in the last step that of the predicted one.
    changed: unlike in the authors' code, the first step has a corrector, too; later steps use the prediction as it was
    before it was moved; the error includes that of the predicted state.
    """
    ratios = list[float]()

    def fit(advance: Advance, t_next: float) -> float:
        goal, counted = known.at(t_next), slice(None) if changed else slice(1, None)

        def error(ratio: float) -> float:
            return sum((x_next - goal).square().mean().item() for x_next in advance(ratio)[counted])

        ratios.append(smallest(error, 0.5, 1.5))
        return ratios[-1]

    def sample(field: VelocityField, noise: Tensor, cond: Cond) -> Tensor:
        left = iter(ratios)
        return _dc(field, noise, cond, steps, changed, lambda *_: next(left))

    _dc(known.field, known.noise, known.cond, steps, changed, fit)
    return sample


def _dc(
    field: VelocityField,
    noise: Tensor,
    cond: Cond,
    steps: int,
    changed: bool,
    choose: Callable[[Advance, float], float],
) -> Tensor:
    ode, x = FieldOde(field, cond), noise
    past, data = list[tuple[Tensor, float]](), ode.data(x, 1.0)
    for i, (t, t_next) in enumerate(pairwise(times_of(steps))):
        step = partial(_dc_step, ode, x, Step(t, t_next, past[:1], steps - i, to_data=True), changed or i > 0)
        used = data
        if len(past) == 2:
            shifted = partial(moved, data, past, t)
            used = shifted(choose(lambda ratio, step=step, shifted=shifted: step(shifted(ratio))[0], t_next))
        (_, x), data_next = step(used)
        past, data = [(data if changed else used, t), *past][:2], data_next
    return x


def _dc_step(ode: FieldOde, x: Tensor, at: Step, corrected: bool, data: Tensor) -> tuple[list[Tensor], Tensor]:
    """[the predicted state, the corrected state] and the data prediction at the former. The last corrects nothing."""
    x_next = _unipc.predict(ode, x, data, at)
    if at.left == 1:
        return [x_next, x_next], data
    data_next = ode.data(x_next, at.t_next)
    return [x_next, _unipc.correct(ode, x, data, at, data_next) if corrected else x_next], data_next


def moved(data: Tensor, past: Sequence[tuple[Tensor, float]], t: float, ratio: float) -> Tensor:
    """The parabola through the prediction at t and two earlier ones, at the earlier time + ratio (t - earlier time)."""
    (data_1, t_1), (data_2, t_2) = past
    u = t_1 + ratio * (t - t_1)
    return (
        data * ((u - t_1) * (u - t_2) / ((t - t_1) * (t - t_2)))
        + data_1 * ((u - t) * (u - t_2) / ((t_1 - t) * (t_1 - t_2)))
        + data_2 * ((u - t) * (u - t_1) / ((t_2 - t) * (t_2 - t_1)))
    )


def smallest(error: Callable[[float], float], low: float, high: float) -> float:
    """The place of the least error, by golden section: exact to 0.003 of the interval if there is one minimum."""
    golden = (5**0.5 - 1) / 2
    a, b = high - golden * (high - low), low + golden * (high - low)
    at_a, at_b = error(a), error(b)
    for _ in range(11):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - golden * (high - low)
            at_a = error(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + golden * (high - low)
            at_b = error(b)
    return (low + high) / 2
