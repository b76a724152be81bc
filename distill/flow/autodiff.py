"""Directional derivatives of networks: exact by forward mode, or by central differences of plain calls."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from distill.flow.interpolants import like

Derivative = Literal["forward", "central"]
Function = Callable[..., Tensor]


class ContiguousGroupNorm(TorchFunctionMode):
    """Group norm gets its input [B, C, ...] contiguous: before torch 2.14 its derivative on CPUs takes no other.
    After attention the channels come last in memory.
    """

    def __torch_function__(
        self, function: Function, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if function is functional.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return function(*args, **(kwargs or {}))


def jvp(
    function: Function,
    at: tuple[Tensor, ...],
    along: tuple[Tensor, ...],
    *,
    method: Derivative = "forward",
    step: float | Tensor = 1e-4,
) -> Tensor:
    """Df along: the derivative of f at the point `at` in the direction `along`, without gradients.

    at, along: as many tensors of equal shapes, floating point; the first are samples [B, ...], the others may be times
    [B]. Always without autocast, in the precision of `at` and the weights: differences of bf16 values are mostly noise.
    forward: one call with dual numbers, with attention by its mathematical formula, as the fused kernels have no
    forward derivative. For networks whose operations all have one; not under hooks that change weights.
    central: (f(at + h along) - f(at - h along)) / 2h with h = `step`, a number or [B]: two plain calls. Its error is
    of order h^2 from curvature and eps/h from rounding. A network called with 1000 t changes noticeably when t moves by
    1e-3, so keep h well below that.
    """
    with torch.no_grad(), torch.autocast(at[0].device.type, enabled=False):
        if method == "forward":
            with sdpa_kernel(SDPBackend.MATH), ContiguousGroupNorm():
                return torch.func.jvp(function, at, along)[1].detach()
        h = torch.as_tensor(step, device=at[0].device).expand(at[0].shape[0])
        forth, back = (
            function(*(x + sign * like(h, x).to(x.dtype) * v for x, v in zip(at, along, strict=True)))
            for sign in (1, -1)
        )
        return (forth - back) / (2 * like(h, forth).to(forth.dtype))
