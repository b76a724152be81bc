"""The laws of a flow map u(x_t, t, s), X = x_t + (s - t) u: each says what u is equal to.

x: [B, ...] at times t [B]; s < t [B] is where the jump ends. velocity: v(x, t, cond), called without gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distill.flow import autodiff
from distill.flow.interpolants import like
from distill.protocols import Cond

AverageVelocityCall = Callable[[Tensor, Tensor, Tensor, Cond], Tensor]
VelocityCall = Callable[[Tensor, Tensor, Cond], Tensor]
SHORTEST = 1e-4  # step of times in float32, of which a difference is still accurate


def lagrangian(
    u: AverageVelocityCall, x: Tensor, t: Tensor, s: Tensor, cond: Cond, velocity: VelocityCall, *, gradient: bool
) -> Tensor:
    """v(X, s) + (t - s) du/ds. gradient: of the derivative; X has none."""
    with torch.no_grad():
        end = velocity(x + like(s - t, x) * u(x, t, s, cond), s, cond)
    slope = autodiff.jvp(lambda at: u(x, t, at, cond), (s,), (torch.ones_like(s),), gradient=gradient)
    return end + like(t - s, x) * slope


def eulerian(
    u: AverageVelocityCall, x: Tensor, t: Tensor, s: Tensor, cond: Cond, velocity: VelocityCall, *, gradient: bool
) -> Tensor:
    """v(x, t) - (t - s) Du, with the derivative Du along (v, 1, 0)."""
    with torch.no_grad():
        v = velocity(x, t, cond)
    direction = (v, torch.ones_like(t), torch.zeros_like(s))
    slope = autodiff.jvp(lambda x, t, s: u(x, t, s, cond), (x, t, s), direction, gradient=gradient)
    return v - like(t - s, x) * slope


@torch.no_grad()
def stepwise(
    u: AverageVelocityCall, x: Tensor, t: Tensor, s: Tensor, cond: Cond, v: Tensor, r: float | Tensor
) -> Tensor:
    """The eulerian law with a difference for the derivative: v - (m - s)/(t - m) (u(x, t, s) - u(x_m, m, s)).

    A step of the velocity v [B, ...] leads from x to x_m = x - (t - m) v at m = t - r (t - s). The law holds up to an
    error of order r, a number in (0, 1]. It is v for r = 1, and for s = t.

    A difference over a short step needs precision: t - m is at least 1e-4, and the two calls are in float32 also under
    autocast, and without dropout, whose masks would differ.
    """
    step = torch.minimum((r * (t - s)).clamp(min=SHORTEST), t - s)
    m = torch.maximum(t - step, s)
    step = t - m  # as rounded
    with torch.autocast(x.device.type, enabled=False), _evaluating(u):
        here = u(x, t, s, cond)
        there = u(x - like(step, x).to(x.dtype) * v, m, s, cond)
    factor = (m - s) / step.clamp(min=SHORTEST / 2)
    return v - like(factor, x) * (here - there)


@torch.no_grad()
def progressive(u: AverageVelocityCall, x: Tensor, t: Tensor, s: Tensor, cond: Cond, r: Tensor) -> Tensor:
    """r u(x, t, m) + (1 - r) u(x_m, m, s): two jumps, which meet at m = t - r (t - s). r: [B] in (0, 1)."""
    m = t - r * (t - s)
    first = u(x, t, m, cond)
    second = u(x + like(m - t, x) * first, m, s, cond)
    return like(r, x) * first + like(1 - r, x) * second


@contextmanager
def _evaluating(network: AverageVelocityCall) -> Iterator[None]:
    """Context manager: the modules of a network are in evaluation mode."""
    training = [each for each in network.modules() if each.training] if isinstance(network, nn.Module) else []
    for each in training:
        each.training = False
    try:
        yield
    finally:
        for each in training:
            each.training = True
