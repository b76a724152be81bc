"""AMED: a solver with two calls per step, and three numbers per step that are fitted to reference paths."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from distill.flow.solvers import FieldOde
from distill.protocols import Cond, VelocityField

from .fitted import Fitted, Paths
from .multistep import times_of

EVALUATIONS = 15  # of the loss in the fit of one step
Advance = Callable[[Tensor], Tensor]  # the numbers of a step [3] -> the state at its end


def fit_amed(known: Paths, steps: int, *, on_velocity: bool) -> Fitted:
    """AMED (Zhou et al. 2023, arXiv 2312.00094) with constant r, c, b per step instead of functions of the sample.

    The paper predicts them from features of the network at its bottleneck, which a velocity field does not have. They
    are fitted step by step, from the states that the steps before lead to, to the states of the reference path.
    """
    numbers = list[Tensor]()

    def fit(advance: Advance, t_next: float) -> Tensor:
        goal = known.at(t_next)
        numbers.append(minimised(lambda theta: (advance(theta) - goal).double().square().mean().log()))
        return numbers[-1]

    def sample(field: VelocityField, noise: Tensor, cond: Cond) -> Tensor:
        left = iter(numbers)
        return amed(field, noise, cond, steps, lambda *_: next(left), on_velocity)

    amed(known.field, known.noise, known.cond, steps, fit, on_velocity)
    return sample


def minimised(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The numbers [3] of the least loss near zero, by L-BFGS."""
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=EVALUATIONS, max_eval=EVALUATIONS, line_search_fn="strong_wolfe")

    def closure() -> float:
        with torch.enable_grad():
            value = loss(theta)
            (theta.grad,) = torch.autograd.grad(value, theta)
        return value.item()

    optimizer.step(closure)
    return theta.detach()


def amed(
    field: VelocityField,
    noise: Tensor,
    cond: Cond,
    steps: int,
    choose: Callable[[Advance, float], Tensor],
    on_velocity: bool,
) -> Tensor:
    """Steps with the numbers that `choose` returns; zeros make those of DPM-Solver-2, or of the midpoint rule.

    on_velocity: in x and t, with 2 calls per step. Otherwise, as in the paper, in x/alpha and rho = sigma/alpha; then
    the first step and the last are DDIM, since ln rho is infinite at t = 1 and t = 0: 2 steps - 2 calls.
    """
    ode, x, step = FieldOde(field, cond), noise, velocity_step if on_velocity else noise_step
    for t, t_next in pairwise(times_of(steps)):
        v = ode.velocity(x, t)
        if not on_velocity and (t == 1 or t_next == 0):
            x = x + (t_next - t) * v
        else:
            advance = partial(step, field, cond, x, v, t, t_next)
            x = advance(choose(advance, t_next))
    return x


def velocity_step(
    field: VelocityField, cond: Cond, x: Tensor, v: Tensor, t: float, t_next: float, theta: Tensor
) -> Tensor:
    r, c, b = numbers_of(theta)
    gap = t_next - t
    rho = b * (t + r * gap) / (1 - t - r * gap)
    return x + (c * gap).to(x.dtype) * _call(field, x + (r * gap).to(x.dtype) * v, rho / (1 + rho), cond)


def noise_step(
    field: VelocityField, cond: Cond, x: Tensor, v: Tensor, t: float, t_next: float, theta: Tensor
) -> Tensor:
    r, c, b = numbers_of(theta)
    y, rho, rho_next = x / (1 - t), t / (1 - t), t_next / (1 - t_next)
    rho_middle = rho_next**r * rho ** (1 - r)
    u = y + (rho_middle - rho).to(x.dtype) * (x + (1 - t) * v)
    t_middle = b * rho_middle / (1 + b * rho_middle)
    alpha = (1 - t_middle).to(x.dtype)
    noise = alpha * u + alpha * _call(field, alpha * u, t_middle, cond)
    return (1 - t_next) * (y + (c * (rho_next - rho)).to(x.dtype) * noise)


def numbers_of(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r in (0, 1): where the second call is; c: factor of the step; b > 0: factor of rho in the network's time."""
    return theta[0].sigmoid(), 1 + theta[1], theta[2].exp()


def _call(field: VelocityField, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return field(x, t.expand(len(x)), cond).to(x.dtype)
