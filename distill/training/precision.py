"""The precision in which networks are called in training."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def autocast(device: torch.device, *, bf16: bool) -> Iterator[None]:
    """Context manager: networks compute in bfloat16 where autocast does so, if `bf16`; else in float32.

    On a CPU, attention is then computed by matrix products. In bfloat16, the backward pass of torch's fused kernel
    takes 8 times as long there as in float32, and longer than all the rest of a small transformer.
    """
    attention = sdpa_kernel(SDPBackend.MATH) if bf16 and device.type == "cpu" else nullcontext()
    # No cache: a cast made without gradients would be reused by a later call that needs gradients.
    with attention, torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        yield
