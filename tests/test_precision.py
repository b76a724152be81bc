"""The precision in which networks are called in training."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from distill.training.precision import autocast

CPU = torch.device("cpu")


class Called(TorchDispatchMode):
    """Notes which operations compute."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bf16", [False, True])
def test_attention_has_no_fused_kernel_in_bf16_on_a_cpu(bf16):
    """Its backward pass is slow there. Gradients are those of float32, within the precision of bfloat16."""
    q, k, v = (torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    q.requires_grad_()
    (exact,) = torch.autograd.grad(scaled_dot_product_attention(q, k, v).square().sum(), q)
    with Called() as called:
        with autocast(CPU, bf16=bf16):
            out = scaled_dot_product_attention(q, k, v)
        (found,) = torch.autograd.grad(out.float().square().sum(), q)
    fused = any("flash" in name for name in called.names)
    assert (fused, out.dtype) == ((False, torch.bfloat16) if bf16 else (True, torch.float32))
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= (0.03 if bf16 else 0) * exact.norm()
