"""The stochastic sampler of EDM (Karras et al. 2022, arXiv 2206.00364, alg. 2): Heun steps, each after adding noise.

Before a step from the noise level rho = sigma/alpha, noise raises rho by the factor 1 + gamma, where gamma =
min(S_CHURN / number of steps, sqrt(2) - 1) if S_MIN <= rho <= S_MAX, else 0. There is no noise before a step from pure
noise, and rho is not raised above the highest level of the field.

Deviation: Heun's method is in the time of the path, not in rho, which is infinite at pure noise.
"""

import math
from dataclasses import replace

from distill.solvers import Ode, Step, Tensor, heun
from distill.solvers._noising import noised, ratio

ORDER = 2
IS_REFERENCE = False
S_CHURN, S_MIN, S_MAX, S_NOISE = 40.0, 0.05, 50.0, 1.003  # of the paper for ImageNet-64, tab. 5

calls = heun.calls
calls_inverting = None


def noises(steps: int) -> int:
    return steps


def look(ode: Ode, x: Tensor, t: float) -> None:
    """Nothing: the first call is made after noise is added."""


def step(ode: Ode, x: Tensor, seen: None, at: Step) -> Tensor:
    t_up = _raised(ode, at)
    if t_up > at.t:
        x = noised(ode, x, at.t, t_up, S_NOISE * ode.noise(x, len(at.grid) - 1 - at.left))
    return heun.step(ode, x, heun.look(ode, x, t_up), replace(at, t=t_up))


def _raised(ode: Ode, at: Step) -> float:
    """The time from which the step is made, after noise is added."""
    rho, highest = ratio(ode, at.t), ratio(ode, ode.highest)
    gamma = min(S_CHURN / (len(at.grid) - 1), math.sqrt(2) - 1) if S_MIN <= rho <= S_MAX else 0.0
    return ode.time(min((1 + gamma) * rho, highest)) if gamma and rho < highest else at.t
