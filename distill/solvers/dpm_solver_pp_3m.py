"""DPM-Solver++(3M) (Lu et al. 2022, arXiv 2211.01095), a multistep solver in lambda = ln(alpha/sigma).

Deviation: the second difference of the data prediction has the weight P3, the integral of its parabola. The authors'
code and diffusers use P3/2, with which the order is 2 instead of 3. The first two steps and the last two steps to data
are of lower order, so the order is 2 as a whole; it is meant for comparisons.
"""

from distill.solvers import Ode, Step, Tensor, _exponential

ORDER = 2
IS_REFERENCE = True
MEMORY = 2


def calls(steps: int) -> int:
    return steps


calls_inverting = None


def look(ode: Ode, x: Tensor, t: float) -> Tensor:
    return ode.data(x, t)


def step(ode: Ode, x: Tensor, data: Tensor, at: Step) -> Tensor:
    past, x_next = _exponential.usable(ode, at), _exponential.first_order(ode, x, data, at)
    if not past:
        return x_next
    h, alpha_next = _exponential.length(ode, at.t, at.t_next), ode.path(at.t_next)[0]
    p1, p2, p3 = _exponential.integrals(h)
    (data1, t1), *older = past
    r0 = _exponential.length(ode, t1, at.t) / h
    slope = (data - data1) / r0
    if not older:
        return x_next + alpha_next * p1 / 2 * slope
    data2, t2 = older[0]
    r1 = _exponential.length(ode, t2, t1) / h
    bend = (slope - (data1 - data2) / r1) / (r0 + r1)
    return x_next + alpha_next * (p2 * (slope + r0 * bend) + p3 * bend)
