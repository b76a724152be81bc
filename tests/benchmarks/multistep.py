"""Multistep solvers that are not in `distill.solvers`: DEIS, iPNDM and GHVB, in the papers' variables and in ours.

In y = x/alpha and rho = sigma/alpha the ODE is dy/drho = E, where E is the noise prediction. On the linear path
rho = t/(1 - t) is infinite at t = 1: the first step is DDIM. The prediction made there, the noise itself, is one of the
earlier predictions of the next steps, unless rho is in their weights. ln rho is infinite at t = 0, too.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy
from torch import Tensor

from distill.flow.solvers import FieldOde
from distill.flow.times import uniform_grid
from distill.protocols import Cond, VelocityField

# (field on the linear path, noise [B, ...], cond, number of steps) -> samples [B, ...]
Sampling = Callable[[VelocityField, Tensor, Cond, int], Tensor]

VARIABLES: dict[str, Callable[[float], float]] = {
    "t": lambda t: t,
    "rho": lambda t: t / (1 - t) if t < 1 else math.inf,
    "ln rho": lambda t: math.log(t / (1 - t)) if 0 < t < 1 else math.inf,
}
POINTS, WEIGHTS = numpy.polynomial.legendre.leggauss(24)


def times_of(steps: int) -> list[float]:
    return uniform_grid(steps, 1.0, 0.0).tolist()


def deis(field: VelocityField, noise: Tensor, cond: Cond, steps: int, *, order: int, variable: str) -> Tensor:
    """DEIS (Zhang & Chen 2022, arXiv 2204.13902): E is a polynomial in t (tAB), rho (rhoAB) or ln rho, integrated."""
    tau, ode, x = VARIABLES[variable], FieldOde(field, cond), noise
    past: list[tuple[float, Tensor]] = []
    for i, (t, t_next) in enumerate(pairwise(times_of(steps))):
        v = ode.velocity(x, t)
        past = [(t, x + (1 - t) * v), *past][:order]
        if t == 1:
            x = x + (t_next - t) * v
            continue
        nodes = [(time, e) for time, e in past if tau(time) < math.inf]
        if tau(0) == math.inf:
            nodes = nodes[: steps - i]  # as DPM-Solver: the last step is of order 1, the one before of order 2 at most
        integrals = exponential_weights(t, t_next, [time for time, _ in nodes], tau)
        y = x / (1 - t) + sum(weight * e for weight, (_, e) in zip(integrals, nodes, strict=True))
        x = (1 - t_next) * y
    return x


def exponential_weights(t: float, t_next: float, nodes: Sequence[float], tau: Callable[[float], float]) -> list[float]:
    """For each node, the integral over rho from t to t_next of its Lagrange polynomial in tau, by quadrature."""
    at = t + (t_next - t) * (POINTS + 1) / 2
    drho = (t_next - t) * WEIGHTS / 2 / (1 - at) ** 2  # dt/(1 - t)^2
    found = []
    for j, node in enumerate(nodes):
        others = [each for k, each in enumerate(nodes) if k != j]
        lagrange = [math.prod((tau(u) - tau(k)) / (tau(node) - tau(k)) for k in others) for u in at.tolist()]
        found.append(float((drho * numpy.array(lagrange)).sum()))
    return found


def ghvb(
    field: VelocityField, noise: Tensor, cond: Cond, steps: int, *, order: float, on_velocity: bool = False
) -> Tensor:
    """GHVB (Wizadwongsa et al. 2023, arXiv 2307.11118): Adams-Bashforth for equal steps on averages of the predictions.

    order: k - 1 + beta with 0 < beta <= 1, from k averages. A whole number (beta = 1) is iPNDM (arXiv 2204.13902),
    where each average is the prediction itself. on_velocity: solves dx/dt = v instead of dy/drho = E.
    """
    count = math.ceil(order)
    beta = order - count + 1
    ode, x, averages = FieldOde(field, cond), noise, list[Tensor]()
    for t, t_next in pairwise(times_of(steps)):
        v = ode.velocity(x, t)
        seen = v if on_velocity else x + (1 - t) * v
        averages = [seen if not averages else (1 - beta) * averages[0] + beta * seen, *averages][:count]
        weights = ghvb_weights(len(averages), beta)
        slope = sum(weight * each for weight, each in zip(weights, averages, strict=True))
        if t == 1 or on_velocity:
            x = x + (t_next - t) * (v if t == 1 else slope)
        else:
            x = x + (t_next - t) / (1 - t) * (slope - x)  # y + (rho_next - rho) slope, times 1 - t_next
    return x


def ghvb_weights(count: int, beta: float) -> list[float]:
    """The weights of the latest `count` averages, the newest first; their sum is 1."""
    b = beta
    scaled = {
        1: [b],
        2: [(2 + b) / 2, -(2 - b) / 2],
        3: [(18 + 5 * b) / 12, -(24 - 8 * b) / 12, (6 - b) / 12],
        4: [(46 + 9 * b) / 24, -(78 - 19 * b) / 24, (42 - 5 * b) / 24, -(10 - b) / 24],
    }
    return [weight / b for weight in scaled[count]]
