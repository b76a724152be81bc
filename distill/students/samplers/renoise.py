"""Sampler of a flow map u(x_t, t, s, cond): jump to data, add fresh noise, repeat.

Song et al. 2023, arXiv 2303.01469, alg. 1, on the linear path.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

SAMPLER = "renoise"
Cond = Mapping[str, Tensor]


def num_fresh(steps: int) -> int:
    """Noises in addition to the first: one for each step but the last."""
    return steps - 1


def sample(
    network: Callable[[Tensor, Tensor, Tensor, Cond], Tensor],
    noise: Tensor,
    t_grid: Tensor,
    cond: Cond,
    *fresh: Tensor,
) -> Tensor:
    """data = x_t - t u(x_t, t, 0), x_s = (1 - s) data + s fresh, along t_grid [N+1] from 1 to 0: N calls.

    fresh: N - 1 independent standard normal tensors like noise [B, ...]; drawn by the caller, who knows the seeds.
    """
    times = t_grid.tolist()
    if times[-1] != 0 or len(fresh) != len(times) - 2:
        raise ValueError(
            f"re-noising along {len(times) - 1} steps needs a grid that ends at 0 and {len(times) - 2} fresh noises, "
            f"got a grid that ends at {times[-1]} and {len(fresh)}"
        )
    x = noise
    for step, (t, s) in enumerate(pairwise(times)):
        at_t = torch.full((x.shape[0],), t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        x = x - t * network(x, at_t, torch.zeros_like(at_t), cond)
        if s > 0:
            x = (1 - s) * x + s * fresh[step]
    return x
