"""SA-Solver (Xue et al. 2023, arXiv 2309.05019): multistep prediction and correction of an SDE, in its data form.

The SDE has the marginals of the ODE for every tau >= 0: tau = 0 is the ODE, tau = 1 the reverse of the noising process.
A step from lambda = ln(alpha/sigma) to lambda + h integrates the data prediction, a polynomial in lambda, exactly. With
q = 1 + tau^2 and the weights P_k of `_exponential.integrals` for the length q h:

    x' = (sigma'/sigma) e^(-tau^2 h) x + alpha' (P1 D + P2 D1 + P3 D2) + sigma' sqrt(1 - e^(-2 tau^2 h)) noise

where D + D1 u + D2 u^2 is the data prediction at lambda + u h. The corrector repeats the step with the prediction at
its end and the same noise, so it costs no network call. The last step has no corrector.

Deviation: with two predictions, the authors' code and diffusers use q h/2, the first term of P2, instead of P2.
"""

import math
from collections.abc import Sequence

from distill.solvers import Ode, Step, Tensor, _exponential
from distill.solvers._noising import ratio

ORDER = 2
IS_REFERENCE = False
MEMORY = 1
TAU = 1.0
RANGE = 0.72, 25.7  # sigma/alpha where tau is TAU; elsewhere it is 0. Steps 800 to 200 of DDPM, as in diffusers


def calls(steps: int) -> int:
    return steps


calls_inverting = None


def noises(steps: int) -> int:
    return steps


def look(ode: Ode, x: Tensor, t: float) -> Tensor:
    return ode.data(x, t)


def step(ode: Ode, x: Tensor, data: Tensor, at: Step) -> Tensor:
    return predicted(ode, x, data, at, tau(ode, at), order=2)


def correct(ode: Ode, x: Tensor, data: Tensor, at: Step, data_next: Tensor) -> Tensor:
    return corrected(ode, x, data, at, data_next, tau(ode, at), order=2)


def tau(ode: Ode, at: Step) -> float:
    """tau during a step, by the noise level at its beginning."""
    return TAU if RANGE[0] <= ratio(ode, at.t) <= RANGE[1] else 0.0


def predicted(ode: Ode, x: Tensor, data: Tensor, at: Step, tau: float, order: int) -> Tensor:
    """The end of the step, from the data predictions at its beginning and up to `order` - 1 <= 2 earlier ones."""
    return _advanced(ode, x, data, at, tau, _earlier(ode, at, order - 1))


def corrected(ode: Ode, x: Tensor, data: Tensor, at: Step, data_next: Tensor, tau: float, order: int) -> Tensor:
    """The same, also from the prediction at the end. order: 2 or 3, the number of predictions that are used."""
    return _advanced(ode, x, data, at, tau, [(data_next, 1.0), *_earlier(ode, at, order - 2)])


def _earlier(ode: Ode, at: Step, most: int) -> list[tuple[Tensor, float]]:
    """(data prediction, u) of earlier times, the latest first; u is negative."""
    h = _exponential.length(ode, at.t, at.t_next)
    return [(each, -_exponential.length(ode, t, at.t) / h) for each, t in _exponential.usable(ode, at)[:most]]


def weights(length: float, places: Sequence[float]) -> list[float]:
    """The weights of D_j - D in P2 D1 + P3 D2, for the data predictions D_j at u = places, at most two."""
    _, p2, p3 = _exponential.integrals(length)
    if len(places) < 2:
        return [p2 / u for u in places]
    u, w = places
    return [(p3 - p2 * w) / (u * (u - w)), (p3 - p2 * u) / (w * (w - u))]


def _advanced(
    ode: Ode, x: Tensor, data: Tensor, at: Step, tau: float, others: Sequence[tuple[Tensor, float]]
) -> Tensor:
    """The step from D = `data` and other data predictions at their places u."""
    (_, sigma), (alpha_next, sigma_next) = ode.path(at.t), ode.path(at.t_next)
    h = _exponential.length(ode, at.t, at.t_next)
    length = (1 + tau**2) * h
    x_next = sigma_next / sigma * (math.exp(-(tau**2) * h) if tau else 1.0) * x
    x_next = x_next + alpha_next * _exponential.integrals(length)[0] * data
    for weight, (other, _) in zip(weights(length, [u for _, u in others]), others, strict=True):
        x_next = x_next + alpha_next * weight * (other - data)
    if tau and sigma_next:
        std = sigma_next * math.sqrt(-math.expm1(-2 * tau**2 * h))
        x_next = x_next + std * ode.noise(x, len(at.grid) - 1 - at.left)
    return x_next
