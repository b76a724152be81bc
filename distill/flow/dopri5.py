"""Solves the teacher's ODE to a tolerance: Dormand & Prince's pair of orders 5 and 4, with a step size per sample.

The step size is chosen from the difference of the two solutions (Hairer, Norsett & Wanner 1993, Solving Ordinary
Differential Equations I, sec. II.4 and tab. II.5.2). Each sample has its own steps, so that it does not depend on the
other samples of its batch. The number of calls therefore differs between samples.

Deviation: step sizes are powers of two. A network's velocities depend on the batch by rounding errors, and step sizes
that follow from them would differ a little. Since a network may change quickly with time, this would change samples:
by up to 0.006 on a teacher of digits, instead of 0.00001.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.core.errors import InputError, RunError
from distill.flow.fields import start
from distill.flow.interpolants import like
from distill.flow.solvers import on_linear_path
from distill.protocols import Cond, VelocityField

# After the velocity at t, there are six more at t - TIMES[i] h, where x is the state moved by the velocities before it
# with WEIGHTS[i]. The last one is at the end of the step: it is the first one of the next step. ERRORS are the
# differences between the weights of the orders 5 and 4.
TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
WEIGHTS = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERRORS = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
CALLS = len(TIMES)  # of the field in one try of a step
FIRST = 1 / 8  # length of the first step that is tried
# The next length / this length is SAFETY error^(-1/5), rounded down to a power of two from SHRINK to GROW.
SAFETY, SHRINK, GROW = 0.9, 1 / 4, 2.0
MOST_TRIES = 1000


class _State(NamedTuple):
    """The samples that are being solved."""

    x: Tensor  # [b, ...]
    v: Tensor  # [b, ...], the velocity there
    t: Tensor  # [b] float64
    h: Tensor  # [b] float64, the length of the step to try next


def solve_adaptive(field: VelocityField, noise: Tensor, cond: Cond, *, tolerance: float) -> tuple[Tensor, Tensor]:
    """Solves the ODE from noise [B, ...] to data, without gradients. Returns samples and the calls of the field [B].

    A step is accepted if the root mean square of the elements' errors is at most 1, each relative to
    tolerance (1 + |x|). If the field is not defined at t = 0, the last step is the data prediction at its lowest time.

    InputError if the tolerance is not positive; RunError if it cannot be reached, for example because it is less than
    the rounding errors of the field.
    """
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance={tolerance} is not possible; give a number between 0 and 1, such as 1e-3")
    field = on_linear_path(field)
    low, high = field.t_range
    with torch.no_grad():
        x = start(field, noise).clone()
        t = torch.full((len(x),), high, dtype=torch.float64, device=x.device)
        h, calls = torch.full_like(t, FIRST), torch.ones_like(t, dtype=torch.int64)
        v = field(x, t, cond).to(x.dtype)
        for _ in range(MOST_TRIES):
            rows = (t > low).nonzero().squeeze(1)
            if len(rows) == 0:
                return x - low * v, calls
            of_rows = {name: value[rows] for name, value in cond.items()}
            before = _State(x[rows], v[rows], t[rows], h[rows])
            x[rows], v[rows], t[rows], h[rows] = _tried(field, before, of_rows, low, tolerance)
            calls[rows] += CALLS
    raise RunError(
        f"dopri5 did not reach the tolerance {tolerance:g} in {MOST_TRIES:,} tries of a step; use a larger tolerance"
    )


def _tried(field: VelocityField, at: _State, cond: Cond, low: float, tolerance: float) -> _State:
    """The states after one try of a step: at the end of the step where it is accepted, else with a shorter step."""
    x, v, t, _ = at
    h = torch.minimum(at.h, t - low)
    stages, gap, x_next = [v], like(h, x).to(x.dtype), x
    for part, weights in zip(TIMES, WEIGHTS, strict=True):
        x_next = x - gap * _combined(weights, stages)
        stages.append(field(x_next, (t - part * h).clamp(min=low), cond).to(x.dtype))
    error = gap * _combined(ERRORS, stages) / (tolerance * (1 + torch.maximum(x.abs(), x_next.abs())))
    size = error.double().square().flatten(1).mean(1).sqrt()  # [b]
    accepted = ~(size > 1)  # NaN is accepted: a shorter step would not help, and the caller refuses such samples
    ratio = torch.where(size.isnan(), GROW, SAFETY * size ** (-1 / 5)).clamp(SHRINK, GROW)
    end = torch.where(h < t - low, t - h, low)
    return _State(
        torch.where(like(accepted, x), x_next, x),
        torch.where(like(accepted, x), stages[-1], v),
        torch.where(accepted, end, t),
        h * torch.exp2(ratio.log2().floor()),
    )


def _combined(weights: Sequence[float], stages: Sequence[Tensor]) -> Tensor:
    """The sum of the stages, each times its weight."""
    terms = [weight * stage for weight, stage in zip(weights, stages, strict=True) if weight]
    return torch.stack(terms).sum(0)
