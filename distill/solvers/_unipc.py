"""UniPC (Zhao et al. 2023, arXiv 2302.04867) in its data form with the weights "bh2": shared by its orders.

The predictor UniP-p makes a step from p data predictions; with p = 1 it is DDIM, with p = 2 DPM-Solver++(2M). The
corrector UniC-p repeats the step with the prediction at its end too, which is the first prediction of the next step, so
it costs no network call. The last step has no corrector.
"""

import math
from collections.abc import Sequence

from distill.solvers import Ode, Step, Tensor, _exponential


def predict(ode: Ode, x: Tensor, data: Tensor, at: Step) -> Tensor:
    """The state at the end of the step, from the data predictions at its beginning and before."""
    past = _exponential.usable(ode, at)
    ratios, slopes = _earlier(ode, data, at, past)
    h = _exponential.length(ode, at.t, at.t_next)
    weights = _weights(h, ratios, len(past)) if len(past) > 1 else [0.5] * len(past)
    return _advanced(ode, x, data, at, weights, slopes)


def correct(ode: Ode, x: Tensor, data: Tensor, at: Step, data_next: Tensor) -> Tensor:
    """The same state, also from the data prediction at the end of the step."""
    past = _exponential.usable(ode, at)
    ratios, slopes = _earlier(ode, data, at, past)
    h = _exponential.length(ode, at.t, at.t_next)
    weights = _weights(h, [*ratios, 1.0], len(past) + 1) if past else [0.5]
    return _advanced(ode, x, data, at, weights, [*slopes, data_next - data])


def _earlier(
    ode: Ode, data: Tensor, at: Step, past: Sequence[tuple[Tensor, float]]
) -> tuple[list[float], list[Tensor]]:
    """For each earlier node, r = (lambda_node - lambda)/h, which is negative, and the slope (D_node - D)/r."""
    h = _exponential.length(ode, at.t, at.t_next)
    ratios = [-_exponential.length(ode, t, at.t) / h for _, t in past]
    return ratios, [(each - data) / ratio for (each, _), ratio in zip(past, ratios, strict=True)]


def _weights(h: float, ratios: Sequence[float], count: int) -> list[float]:
    """The solution of sum_j r_j^(k-1) w_j = b_k for k = 1 ... count."""
    b = [math.factorial(k) * psi / math.expm1(-h) for k, psi in enumerate(_psi(-h, count), 1)]
    return _solved([[ratio**k for ratio in ratios] for k in range(count)], b)


def _psi(minus_h: float, count: int) -> list[float]:
    """psi_k = sum over n >= 1 of (-h)^n/(n + k)!; psi_1 = (e^-h - 1)/(-h) - 1, the next is psi_k/(-h) - 1/(k + 1)!."""
    if minus_h > -1:  # the differences below lose digits for short steps
        return [sum(minus_h**n / math.factorial(n + k) for n in range(1, 20)) for k in range(1, count + 1)]
    found = [math.expm1(minus_h) / minus_h - 1]
    for k in range(1, count):
        found.append(found[-1] / minus_h - 1 / math.factorial(k + 1))
    return found


def _solved(rows: list[list[float]], right: list[float]) -> list[float]:
    """Solves a linear system of at most three equations by Cramer's rule."""
    whole = _determinant(rows)
    replaced = [
        [[*row[:j], value, *row[j + 1 :]] for row, value in zip(rows, right, strict=True)] for j in range(len(rows))
    ]
    return [_determinant(each) / whole for each in replaced]


def _determinant(rows: list[list[float]]) -> float:
    """By the first row; 1 for no rows."""
    if not rows:
        return 1.0
    first, *rest = rows
    return sum(
        (-1) ** j * value * _determinant([[*row[:j], *row[j + 1 :]] for row in rest]) for j, value in enumerate(first)
    )


def _advanced(
    ode: Ode, x: Tensor, data: Tensor, at: Step, weights: Sequence[float], slopes: Sequence[Tensor]
) -> Tensor:
    """x' = (sigma'/sigma) x + alpha' (1 - e^-h) (D + sum of weights times slopes)."""
    (alpha, sigma), (alpha_next, sigma_next) = ode.path(at.t), ode.path(at.t_next)
    x_next, factor = _exponential.first_order(ode, x, data, at), alpha_next - alpha * sigma_next / sigma
    for weight, slope in zip(weights, slopes, strict=True):
        x_next = x_next + factor * weight * slope
    return x_next
