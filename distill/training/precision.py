"""The precision in which networks are called in training."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention(device: torch.device, *, bf16: bool) -> AbstractContextManager[None]:
    """Context manager for both passes: on a CPU in bfloat16, attention is computed by matrix products.

    There, the backward pass of torch's fused kernel takes 8 times as long as in float32, and longer than all the rest
    of a small transformer. The backward pass belongs to it, because it may recompute what the forward pass computed.
    """
    return sdpa_kernel(SDPBackend.MATH) if bf16 and device.type == "cpu" else nullcontext()


@contextmanager
def autocast(device: torch.device, *, bf16: bool) -> Iterator[None]:
    """Context manager: networks compute in bfloat16 where autocast does so, if `bf16`; else in float32."""
    # No cache: a cast made without gradients would be reused by a later call that needs gradients.
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        yield
