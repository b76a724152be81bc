"""Adams-Bashforth of two steps: the velocity is extrapolated by a line in time. One network call per step.

The first step is Euler's. On equal steps this is the pseudo-corrector of FlowTurbo (Zhao et al. 2024, arXiv
2409.18128). Only the first step is of lower order. In solvers in lambda = ln(alpha/sigma), which is infinite at noise
and at data, the second and the last are, too.
"""

from distill.solvers import Ode, Step, Tensor, _adams

ORDER = 2
IS_REFERENCE = True
MEMORY = 1


def calls(steps: int) -> int:
    return steps


calls_inverting = calls


def look(ode: Ode, x: Tensor, t: float) -> Tensor:
    return ode.velocity(x, t)


def step(ode: Ode, x: Tensor, v: Tensor, at: Step) -> Tensor:
    return _adams.extrapolated(x, v, at)
