"""The precision in which networks are called in training."""

from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from distill.networks.two_times import recomputed
from distill.training.precision import attention, autocast

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
        with attention(CPU, bf16=bf16), autocast(CPU, bf16=bf16):
            out = scaled_dot_product_attention(q, k, v)
        (found,) = torch.autograd.grad(out.float().square().sum(), q)
    fused = any("flash" in name for name in called.names)
    assert (fused, out.dtype) == ((False, torch.bfloat16) if bf16 else (True, torch.float32))
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= (0.03 if bf16 else 0) * exact.norm()


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_attention_uses_the_kernels_of_the_forward_pass(bf16):
    """With others, torch refuses the backward pass. Gradients are those without recomputation."""
    made = [torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    gradients = []
    for call in (scaled_dot_product_attention, partial(recomputed, scaled_dot_product_attention)):
        q, k, v = (each.clone().requires_grad_() for each in made)
        with attention(CPU, bf16=bf16):
            with autocast(CPU, bf16=bf16):
                out = call(q, k, v)
            gradients.append(torch.autograd.grad(out.float().square().sum(), (q, k, v)))
    for kept, again in zip(*gradients, strict=True):
        assert torch.equal(kept, again)
