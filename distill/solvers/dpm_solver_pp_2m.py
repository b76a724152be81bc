"""DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, alg. 2): multistep in lambda = ln(alpha/sigma).

First and last step are of first order. On a uniform grid of t between noise and data the error is h^2 ln(1/h), not
h^2: near them the steps in lambda do not become small.
"""

import math

from distill.solvers import Ode, Tensor

ORDER = 2
IS_REFERENCE = True


def calls(steps: int) -> int:
    return steps


calls_inverting = None


def look(ode: Ode, x: Tensor, t: float) -> Tensor:
    return ode.data(x, t)


def step(ode: Ode, x: Tensor, data: Tensor, t: float, t_next: float, before: tuple[Tensor, float] | None) -> Tensor:
    """With e^-h = (alpha sigma_next)/(sigma alpha_next) nothing diverges where lambda does (alpha = 0 at pure noise,
    sigma = 0 at data).
    """
    (alpha, sigma), (alpha_next, sigma_next) = ode.path(t), ode.path(t_next)
    if before is not None and not math.isinf(h_prev := _h(ode, before[1], t)):
        data = data + _h(ode, t, t_next) / (2 * h_prev) * (data - before[0])
    return (sigma_next / sigma) * x + (alpha_next - alpha * sigma_next / sigma) * data


def _h(ode: Ode, t: float, t_next: float) -> float:
    """The step in lambda."""
    (alpha, sigma), (alpha_next, sigma_next) = ode.path(t), ode.path(t_next)
    return math.inf if alpha * sigma_next == 0 else math.log((alpha_next * sigma) / (alpha * sigma_next))
