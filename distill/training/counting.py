"""Counts what calls of networks cost, also on tensors without values: then no weights and no GPU are needed.

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
class TurnCounts:
    """What a loss and its gradients cost, for the samples that they were counted with."""

    operations: int
    """floating-point operations of the forward and the backward pass, including what is recomputed in it"""
    activations: int
    """largest number of bytes that autograd keeps for the backward pass, without parameters"""


def count_forward(call: Callable[[], object]) -> int:
    """Floating-point operations of `call` without gradients; a multiplication and an addition are two.

    Torch's FlopCounterMode counts them: those of matrix products, convolutions and attention. The tensors may be fake
    ones (`torch._subclasses.FakeTensorMode`).
    """
    with torch.no_grad(), _counter() as counter:
        call()
    return counter.get_total_flops()


def count_turn(loss: Callable[[], Tensor]) -> TurnCounts:
    """Compute `loss` and its gradients, and count both passes. The gradients are added up, as always."""
    with _counter() as counter, Activations() as activations:
        loss().sum().backward()
    return TurnCounts(counter.get_total_flops(), activations.peak)


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
