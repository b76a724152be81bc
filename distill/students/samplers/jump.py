"""Sampler of a flow map u(x_t, t, s, cond): deterministic jumps."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

SAMPLER = "jump"
Cond = Mapping[str, Tensor]


def num_fresh(steps: int) -> int:
    """Noises in addition to the first: none."""
    return 0


def sample(
    network: Callable[[Tensor, Tensor, Tensor, Cond], Tensor], noise: Tensor, t_grid: Tensor, cond: Cond
) -> Tensor:
    """x_s = x_t + (s - t) u along t_grid [N+1]: N calls. noise [B, ...] is x at t_grid[0]; returns x at t_grid[N]."""
    x = noise
    for t, s in pairwise(t_grid.tolist()):
        at_t = torch.full((x.shape[0],), t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        x = x + (s - t) * network(x, at_t, torch.full_like(at_t, s), cond)
    return x
