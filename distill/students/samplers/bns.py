"""Sampler of a velocity field v(x_t, t, cond) by a fitted solver: a few numbers for each step.

Non-stationary Bespoke solvers, Shaul et al. 2024, arXiv 2403.01329.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

SAMPLER = "bns"
Cond = Mapping[str, Tensor]


def num_fresh(steps: int) -> int:
    """Noises in addition to the first: none."""
    return 0


def sample(
    network: Callable[[Tensor, Tensor, Cond], Tensor], noise: Tensor, t_grid: Tensor, cond: Cond, rows: Tensor
) -> Tensor:
    """x_{i+1} = a_i noise + sum_{j <= i} b_ij v(x_j, t_j) along t_grid [N+1]: N calls. noise [B, ...]; returns x_N.

    rows: [N, N+1]; row i is a_i, b_i0, ..., b_ii, and zeros. Only x_N lies on the path of the ODE, and not the states
    before it.
    """
    x, velocities = noise, []
    dtype = torch.promote_types(x.dtype, torch.float32)  # of times and sums
    for t, (a, *b) in zip(t_grid.tolist(), rows.tolist(), strict=False):
        velocities.append(network(x, torch.full((x.shape[0],), t, dtype=dtype, device=x.device), cond))
        total = a * noise.to(dtype)
        for weight, v in zip(b, velocities, strict=False):
            total = total + weight * v.to(dtype)
        x = total.to(noise.dtype)
    return x
