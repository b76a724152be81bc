"""Sampler of a velocity field v(x_t, t, cond): straight steps."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

SAMPLER = "euler"
Cond = Mapping[str, Tensor]


def num_fresh(steps: int) -> int:
    """Noises in addition to the first: none."""
    return 0


def sample(network: Callable[[Tensor, Tensor, Cond], Tensor], noise: Tensor, t_grid: Tensor, cond: Cond) -> Tensor:
    """x_s = x_t + (s - t) v along t_grid [N+1]: N calls. noise [B, ...] is x at t_grid[0]; returns x at t_grid[N]."""
    x = noise
    for t, s in pairwise(t_grid.tolist()):
        at_t = torch.full((x.shape[0],), t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        x = x + (s - t) * network(x, at_t, cond)
    return x
