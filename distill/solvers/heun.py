"""Heun's method: an Euler step corrected by the trapezoidal rule (Karras et al. 2022, arXiv 2206.00364, alg. 1).

A step to sigma = 0, or to a time below the field's range, is an Euler step. One such step does not change the order.
"""

from distill.solvers import Ode, Step, Tensor

ORDER = 2
IS_REFERENCE = True


def calls(steps: int) -> int:
    """Two calls per step, but one in the last: it is an Euler step, which makes no call at t = 0."""
    return 2 * steps - 1


def calls_inverting(steps: int) -> int:
    return 2 * steps


def look(ode: Ode, x: Tensor, t: float) -> Tensor:
    return ode.velocity(x, t)


def step(ode: Ode, x: Tensor, v: Tensor, at: Step) -> Tensor:
    x_next = x + (at.t_next - at.t) * v
    if at.t_next >= ode.lowest and ode.path(at.t_next)[1] > 0:
        x_next = x + (at.t_next - at.t) * (v + ode.velocity(x_next, at.t_next)) / 2
    return x_next
