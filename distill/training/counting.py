"""Counts what a call of a network costs, also on tensors without values: then no weights and no GPU are needed.

On a CPU, real or pretended, torch computes attention with its kernel `flash`, which keeps the result and one number per
row for the backward pass, not the whole matrix. The fused kernels of GPUs keep the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from distill.training.memory import Activations

ATTENTION = "flash"  # the kernel whose activations are counted, for tables


@dataclass(frozen=True)
class CallCounts:
    """What a call of a network costs, for the samples that it was counted with."""

    forward: int
    """floating-point operations of the forward pass; a multiplication and an addition are two"""
    training: int
    """those of the forward and the backward pass, including what is recomputed in it"""
    activations: int
    """largest number of bytes that autograd keeps for the backward pass, without parameters"""


def count(call: Callable[[], Tensor]) -> CallCounts:
    """Run the forward pass of `call`, then its forward and backward pass, and count both.

    call: calls a network in which some parameters have requires_grad=True. Their gradients are added up, as always.
    The tensors may be fake ones (`torch._subclasses.FakeTensorMode`). Torch's FlopCounterMode counts the operations: of
    matrix products, convolutions and attention.
    """
    with torch.no_grad(), _counter() as forward:
        call()
    with _counter() as training, Activations() as activations:
        call().sum().backward()
    return CallCounts(forward.get_total_flops(), training.get_total_flops(), activations.peak)


def _counter() -> FlopCounterMode:
    """Torch's counter, with formulas for attention on CPUs, for which it has none."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))
