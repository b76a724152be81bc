"""DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, alg. 2), a multistep solver in lambda = ln(alpha/sigma).

The first and the last step are of first order. On a uniform grid of t with step size h, the error is of order
h^2 ln(1/h) instead of h^2, because near noise and data the steps in lambda do not become small.
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
    """Uses e^-h = (alpha sigma_next)/(sigma alpha_next), with h the step in lambda.

    This stays finite where lambda is infinite: at pure noise (alpha = 0) and at data (sigma = 0).
    """
    (alpha, sigma), (alpha_next, sigma_next) = ode.path(t), ode.path(t_next)
    if before is not None and not math.isinf(h_prev := _h(ode, before[1], t)):
        data = data + _h(ode, t, t_next) / (2 * h_prev) * (data - before[0])
    return (sigma_next / sigma) * x + (alpha_next - alpha * sigma_next / sigma) * data


def _h(ode: Ode, t: float, t_next: float) -> float:
    """The step size in lambda; infinite from pure noise or to data."""
    (alpha, sigma), (alpha_next, sigma_next) = ode.path(t), ode.path(t_next)
    return math.inf if alpha * sigma_next == 0 else math.log((alpha_next * sigma) / (alpha * sigma_next))
