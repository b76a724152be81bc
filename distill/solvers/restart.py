"""Restart sampling (Xu et al. 2023, arXiv 2306.14878): Heun's method that goes back to a noisier time and solves again.

When the solution reaches the lower end of an interval of noise levels rho = sigma/alpha, noise is added up to the upper
end, and the ODE is solved back, several times. The lower end is moved to the nearest time of the grid. The steps back
are evenly spaced in rho^(1/7), as in EDM. Each pass reduces the errors made before it, but costs calls, so this is for
forty calls or more.
"""

from dataclasses import dataclass

from distill.core.errors import InputError
from distill.solvers import Ode, Step, Tensor, heun
from distill.solvers._noising import noised, ratio


@dataclass(frozen=True)
class RestartInterval:
    """Noise levels between which the solution goes back and forth."""

    low: float  # rho
    high: float
    steps: int  # of Heun, for the way back
    passes: int


ORDER = 2
IS_REFERENCE = False
INTERVALS = (RestartInterval(0.14, 0.30, steps=2, passes=2),)  # the authors' for CIFAR-10: 43 calls in 18 steps
LEAST_STEPS = 5  # with fewer uniform steps, no time lies between data and the upper end of the interval
POWER = 7  # steps are uniform in rho^(1/POWER)


def calls(steps: int) -> int:
    """Those of Heun, and two for each step of a pass, which never ends at data."""
    return heun.calls(steps) + sum(2 * each.steps * each.passes for each in INTERVALS)


calls_inverting = None


def noises(steps: int) -> int:
    return sum(each.passes for each in INTERVALS)


look = heun.look


def step(ode: Ode, x: Tensor, v: Tensor, at: Step) -> Tensor:
    x, k = heun.step(ode, x, v, at), 0
    for interval in INTERVALS:
        if at.t_next == _lower_end(ode, at, interval):
            for each in range(interval.passes):
                x = _again(ode, x, at.t_next, interval, k + each)
        k += interval.passes
    return x


def _lower_end(ode: Ode, at: Step, interval: RestartInterval) -> float:
    """The time of the grid at which the interval's passes are made. Raises InputError if there is none."""
    inner = [t for t in at.grid[1:] if 0 < ratio(ode, t) < interval.high]
    if not inner:
        raise InputError(
            f"restart needs a time with sigma/alpha between 0 and {interval.high:g}, but none of the "
            f"{len(at.grid) - 1} steps ends there; use more steps"
        )
    return min(inner, key=lambda t: abs(ratio(ode, t) - interval.low))


def _again(ode: Ode, x: Tensor, t: float, interval: RestartInterval, k: int) -> Tensor:
    """One pass: from t up to the upper end of the interval by noise k, and back to t."""
    ends = [rho ** (1 / POWER) for rho in (interval.high, ratio(ode, t))]
    inner = [ends[0] + (ends[1] - ends[0]) * i / interval.steps for i in range(interval.steps)]
    times = [*(ode.time(each**POWER) for each in inner), t]
    x = noised(ode, x, t, times[0], ode.noise(x, k))
    for i, (now, then) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x = heun.step(ode, x, heun.look(ode, x, now), Step(now, then, (), interval.steps - i, to_data=False))
    return x
