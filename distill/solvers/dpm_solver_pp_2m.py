"""DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, alg. 2), a multistep solver in lambda = ln(alpha/sigma).

The first and the last step are of first order. On a uniform grid of t with step size h, the error is of order
h^2 ln(1/h) instead of h^2, because near noise and data the steps in lambda do not become small.
"""

import math

from distill.solvers import Ode, Step, Tensor, _exponential

ORDER = 2
IS_REFERENCE = True
MEMORY = 1


def calls(steps: int) -> int:
    return steps


calls_inverting = None


def look(ode: Ode, x: Tensor, t: float) -> Tensor:
    return ode.data(x, t)


def step(ode: Ode, x: Tensor, data: Tensor, at: Step) -> Tensor:
    if at.past and at.left > 1:
        data1, t1 = at.past[0]
        h_before = _exponential.length(ode, t1, at.t)
        if not math.isinf(h_before):
            data = data + _exponential.length(ode, at.t, at.t_next) / (2 * h_before) * (data - data1)
    return _exponential.first_order(ode, x, data, at)
