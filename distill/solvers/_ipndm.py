"""Shared by the iPNDM solvers (Zhang & Chen 2022, arXiv 2204.13902): fixed weights of the latest noise predictions.

In y = x/alpha and rho = sigma/alpha the ODE is dy/drho = E, where E is the noise prediction. A step is that of
Adams-Bashforth for equal steps of rho: y' = y + (rho' - rho) (w_0 E + w_1 E_1 + ...). From pure noise, where rho is
infinite, the step is DDIM. The prediction made there is the noise itself, and counts as an earlier prediction in the
steps after it.
"""

from distill.solvers import Ode, Step, Tensor, _exponential

WEIGHTS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}  # of the latest predictions, the newest first


def look(ode: Ode, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """The predictions of data and of noise."""
    (alpha, sigma), data = ode.path(t), ode.data(x, t)
    return data, (x - alpha * data) / sigma


def step(ode: Ode, x: Tensor, seen: tuple[Tensor, Tensor], at: Step) -> Tensor:
    """Uses as many earlier predictions as `at.past` has."""
    data, noise = seen
    (alpha, sigma), (alpha_next, sigma_next) = ode.path(at.t), ode.path(at.t_next)
    if alpha == 0:
        return _exponential.first_order(ode, x, data, at)
    noises = [noise, *(earlier for (_, earlier), _ in at.past)]
    mean = sum(weight * each for weight, each in zip(WEIGHTS[len(noises)], noises, strict=True))
    return alpha_next / alpha * x + (sigma_next - sigma * alpha_next / alpha) * mean
