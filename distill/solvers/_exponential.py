"""Shared by solvers that integrate the data prediction in lambda = ln(alpha/sigma), exactly up to a polynomial.

A step is h = lambda_next - lambda > 0. lambda is infinite at pure noise (alpha = 0) and at data (sigma = 0); the steps
there are of first order, which is finite.
"""

import math
from collections.abc import Sequence

from distill.solvers import Ode, Step, Tensor


def length(ode: Ode, t: float, t_next: float) -> float:
    """h from t to t_next; infinite from pure noise or to data."""
    (alpha, sigma), (alpha_next, sigma_next) = ode.path(t), ode.path(t_next)
    return math.inf if alpha * sigma_next == 0 else math.log((alpha_next * sigma) / (alpha * sigma_next))


def first_order(ode: Ode, x: Tensor, data: Tensor, at: Step) -> Tensor:
    """The step with a constant data prediction (DDIM), from (alpha sigma_next)/(sigma alpha_next) = e^-h."""
    (alpha, sigma), (alpha_next, sigma_next) = ode.path(at.t), ode.path(at.t_next)
    return (sigma_next / sigma) * x + (alpha_next - alpha * sigma_next / sigma) * data


def usable(ode: Ode, at: Step) -> Sequence[tuple[Tensor, float]]:
    """The earlier predictions that this step may use: the latest of those with finite lambda, fewer near data.

    The last step to data is of order 1, the one before it of order 2 at most.
    """
    finite = [node for node in at.past if ode.path(node[1])[0] > 0]
    return finite[: at.left - 1] if at.to_data else finite


def integrals(h: float) -> tuple[float, float, float]:
    """P1 = 1 - e^-h, P2 = 1 - P1/h, P3 = 1 - 2 P2/h: the weights of 1, u/h and (u/h)^2 in a step of length h.

    For short steps, series are used, since the differences lose up to eight digits.
    """
    if h < 1e-2:
        terms = range(1, 9)
        p2 = -sum((-h) ** k / math.factorial(k + 1) for k in terms)
        p3 = -2 * sum((-h) ** k / math.factorial(k + 2) for k in terms)
        return -math.expm1(-h), p2, p3
    p1 = -math.expm1(-h)
    p2 = 1 - p1 / h
    return p1, p2, 1 - 2 * p2 / h
