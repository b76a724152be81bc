"""Shared by stochastic solvers: adds noise to a state, which moves it to a noisier time of the path."""

import math

from distill.solvers import Ode, Tensor


def ratio(ode: Ode, t: float) -> float:
    """sigma/alpha at t; infinite at pure noise."""
    alpha, sigma = ode.path(t)
    return sigma / alpha if alpha else math.inf


def noised(ode: Ode, x: Tensor, t: float, t_up: float, noise: Tensor) -> Tensor:
    """The state at t_up > t, where x is the state at t. If x has the marginal distribution at t, it has that at t_up.

    It is a x + b noise with a = alpha_up/alpha and b^2 = sigma_up^2 - (a sigma)^2.
    """
    (alpha, sigma), (alpha_up, sigma_up) = ode.path(t), ode.path(t_up)
    scale = alpha_up / alpha
    return scale * x + math.sqrt(max(0.0, sigma_up**2 - (scale * sigma) ** 2)) * noise
