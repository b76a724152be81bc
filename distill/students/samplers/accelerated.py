"""Sampler of a velocity and its acceleration: paths of constant acceleration.

Park et al. 2024, arXiv 2411.00322, in our time.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

SAMPLER = "accelerated"
Cond = Mapping[str, Tensor]


def num_fresh(steps: int) -> int:
    """Noises in addition to the first: none."""
    return 0


def sample(
    network: Callable[[Tensor, Tensor, Tensor | None, Cond], Tensor], noise: Tensor, t_grid: Tensor, cond: Cond
) -> Tensor:
    """x_s = x_t + (s - t) (v + ((t + s) / 2 - 1) a(x_t, t, v)) with v = v(noise, 1), along t_grid [N+1] from 1: N + 1
    calls, the first for v. The average of a velocity that is linear in t: exact for any N. noise [B, ...].
    """
    x = noise
    dtype = torch.promote_types(x.dtype, torch.float32)
    v = network(noise, torch.ones(x.shape[0], dtype=dtype, device=x.device), None, cond)
    for t, s in pairwise(t_grid.tolist()):
        at_t = torch.full((x.shape[0],), t, dtype=dtype, device=x.device)
        x = x + (s - t) * (v + ((t + s) / 2 - 1) * network(x, at_t, v, cond))
    return x
