"""The explicit midpoint rule: x_next = x + (t_next - t) v(x + (t_next - t)/2 v, (t + t_next)/2).

A solver of somebody else's package, as small as they get.
"""

from distill.solvers import Ode, Step, Tensor

ORDER = 2
IS_REFERENCE = True


def calls(steps: int) -> int:
    return 2 * steps


calls_inverting = calls


def look(ode: Ode, x: Tensor, t: float) -> Tensor:
    return ode.velocity(x, t)


def step(ode: Ode, x: Tensor, v: Tensor, at: Step) -> Tensor:
    middle = max((at.t + at.t_next) / 2, ode.lowest)
    return x + (at.t_next - at.t) * ode.velocity(x + (middle - at.t) * v, middle)
