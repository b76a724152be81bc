"""Directional derivatives of networks, by forward-mode differentiation (exact) or by central differences."""

import warnings
from collections.abc import Callable
from functools import cache
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
    """Makes the input [B, C, ...] of every group norm contiguous.

    Before torch 2.14, the forward derivative of group norm on CPUs supports contiguous inputs only. The output of an
    attention layer is channels-last.
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
    gradient: bool = False,
) -> Tensor:
    """Returns the Jacobian-vector product: the derivative of `function` at the point `at` in the direction `along`.

    at, along: floating-point tensors, pairwise of equal shapes. The first is a batch of samples [B, ...], the others
    may be times [B].
    method "forward": one call in forward mode. All operations of the network need a forward derivative. Attention uses
    the math kernel, because the fused kernels have none. Not supported under hooks that change weights.
    method "central": (f(at + h along) - f(at - h along)) / 2h with h = `step`, a number or [B]. This takes two calls.
    Its error is of order h^2 (curvature) plus eps/h (rounding). A network that is called with 1000 t changes noticeably
    if t changes by 1e-3, so keep h well below that.

    The result has no gradient, unless `gradient` asks for it. Autocast is disabled, because differences of bf16 values
    are mostly rounding noise.
    """
    with torch.set_grad_enabled(gradient and torch.is_grad_enabled()), torch.autocast(at[0].device.type, enabled=False):
        if method == "forward":
            _load_rules()
            with sdpa_kernel(SDPBackend.MATH), ContiguousGroupNorm():
                found: Tensor = torch.func.jvp(function, at, along)[1]
                return found if gradient else found.detach()
        h = torch.as_tensor(step, device=at[0].device).expand(at[0].shape[0])
        forth, back = (
            function(*(x + sign * like(h, x).to(x.dtype) * v for x, v in zip(at, along, strict=True)))
            for sign in (1, -1)
        )
        return (forth - back) / (2 * like(h, forth).to(forth.dtype))


@cache
def _load_rules() -> None:
    """Let torch load its rules of forward-mode derivatives now, without its warning that they are made by torch.jit."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))
