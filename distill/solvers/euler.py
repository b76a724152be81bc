"""Euler: x_next = x + (t_next - t) v. On the linear path this is DDIM (Song et al. 2020, arXiv 2010.02502)."""

from distill.solvers import Ode, Step, Tensor

ORDER = 1
IS_REFERENCE = False


def calls(steps: int) -> int:
    return steps


def calls_inverting(steps: int) -> int:
    return steps


def look(ode: Ode, x: Tensor, t: float) -> Tensor:
    return ode.velocity(x, t)


def step(ode: Ode, x: Tensor, v: Tensor, at: Step) -> Tensor:
    return x + (at.t_next - at.t) * v
