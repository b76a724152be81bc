"""The explicit midpoint rule: x_next = x + (t_next - t) v(x + (t_next - t)/2 v, (t + t_next)/2).

A solver of somebody else's package, as small as they get.
"""

from distill.solvers import Ode, Tensor

ORDER = 2
IS_REFERENCE = True


def calls(steps: int) -> int:
    return 2 * steps


calls_inverting = calls


def look(ode: Ode, x: Tensor, t: float) -> Tensor:
    return ode.velocity(x, t)


def step(ode: Ode, x: Tensor, v: Tensor, t: float, t_next: float, before: tuple[Tensor, float] | None) -> Tensor:
    middle = max((t + t_next) / 2, ode.lowest)
    return x + (t_next - t) * ode.velocity(x + (middle - t) * v, middle)
