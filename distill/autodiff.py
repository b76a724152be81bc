"""Directional derivatives of networks: exact by forward mode, or by central differences of plain calls."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Derivative = Literal["forward", "central"]
Function = Callable[..., Tensor]


def jvp(
    function: Function,
    at: tuple[Tensor, ...],
    along: tuple[Tensor, ...],
    *,
    method: Derivative = "forward",
    step: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """(f, Df along): f at the point `at`, and its derivative in the direction `along`; neither has gradients.

    at, along: as many tensors of equal shapes, floating point; the first are samples, the others may be times [B].
    forward: one call with dual numbers, without autocast, with attention by its mathematical formula, as the fused
    kernels have no forward derivative. For networks whose operations all have one; not under hooks that change weights.
    central: (f(at + h along) - f(at - h along)) / 2h with h = `step`, three plain calls; its error is of order h^2
    from curvature and eps/h from rounding. Networks that are called with 1000 t bend within 1e-3 of t.
    """
    with torch.no_grad():
        if method == "forward":
            with sdpa_kernel(SDPBackend.MATH), torch.autocast(at[0].device.type, enabled=False):
                value, derivative = torch.func.jvp(function, at, along)
            return value.detach(), derivative.detach()
        forth, back = (function(*(x + sign * step * v for x, v in zip(at, along, strict=True))) for sign in (1.0, -1.0))
        return function(*at), (forth - back) / (2 * step)
