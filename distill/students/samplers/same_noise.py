"""Sampler of a velocity field v(x_t, t, cond): jump to data, go back along the line to the noise it began from, repeat.

The new update rule of rf++ (Lee et al. 2024, arXiv 2405.20320). In one or two steps, and along straight paths in any
number, it is Euler's.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

SAMPLER = "same_noise"
Cond = Mapping[str, Tensor]


def num_fresh(steps: int) -> int:
    """Noises in addition to the first: none."""
    return 0


def sample(network: Callable[[Tensor, Tensor, Cond], Tensor], noise: Tensor, t_grid: Tensor, cond: Cond) -> Tensor:
    """data = x_t - t v(x_t, t), x_s = (1 - s) data + s noise, along t_grid [N+1] from 1: N calls. noise [B, ...] is x
    at 1; returns x at t_grid[N].
    """
    x = noise
    for t, s in pairwise(t_grid.tolist()):
        at_t = torch.full((x.shape[0],), t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        x = (1 - s) * (x - t * network(x, at_t, cond)) + s * noise
    return x
