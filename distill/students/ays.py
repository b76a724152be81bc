"""Costs of steps by Align Your Steps (AYS, Sabour et al. 2024, arXiv 2404.14507), for the step times of `step_times`.

Let rho = sigma/alpha, D(x, rho) be the data prediction, and x_rho = data + rho noise. A first-order step of the reverse
SDE from rho_i to rho_j uses D at its start during the whole step. By Girsanov's theorem, the KL divergence between the
samples of the exact SDE and those of such steps is at most the sum over the steps of

    c(i, j) = integral from rho_j to rho_i of rho^-3 E || D(x_rho, rho) - D(x_{rho_i}, rho_i) ||^2 d rho,

where x_{rho_i} is x_rho with more noise. With u = rho^-2, this is half the integral of the mean square over u, so it is
finite for rho_i = infinity (t = 1, u = 0). It depends on the network, but not on a solver. For data N(m, L) it is, per
dimension, c(i, j) = (y - 1 - ln y)/2 with y = (1 + L u_j)/(1 + L u_i).

The costs are estimated without bias. Each sample has one path of noise, x_rho = data + W(rho^2) with a Brownian motion
W. D is called on this path at each time of the fine grid above 0, and at one random time, uniform in u, between each
two of them: 2 M - 1 calls per sample for M fine steps. The squared distances of all pairs of these predictions need no
further call. As all costs have the same noise, differences between them are less noisy than the costs.

The integral diverges for rho_j = 0. Therefore, it ends at the last time of the fine grid above 0, which is 1/M for a
field that is defined down to 0: a step to data costs the same as a step to that time. A finer grid moves the chosen
times towards data.

Deviations from the paper: dynamic programming instead of coordinate descent, and the network's own samples as data.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distill.flow import solvers
from distill.flow.draws import key, sample_noise, uniforms
from distill.flow.interpolants import like
from distill.flow.times import uniform_grid
from distill.protocols import Cond, VelocityField

GOLDEN = (math.sqrt(5) - 1) / 2


def measure(
    field: VelocityField, data: Tensor, cond: Cond, *, seed: int, indices: Sequence[int], fine: int
) -> tuple[list[float], Tensor]:
    """The M + 1 times of the fine grid, and the costs [M + 1, M + 1] float64, means over the samples data [n, ...].

    fine: M. indices: of the samples [n]; their noise depends only on these and on the seed.
    """
    field = solvers.on_linear_path(field)
    t_grid = uniform_grid(fine, field.t_range[1], field.t_range[0])
    u = ((1 - t_grid[:-1]) / t_grid[:-1]).square()  # [M], increasing
    costs = torch.full((fine + 1, fine + 1), torch.inf, dtype=torch.float64, device=data.device)
    with torch.no_grad():
        starts, between = _predictions(field, data, cond, u, seed, indices)
        for i in range(fine - 1):
            changes = [(later - starts[i]).double().square().flatten(1).sum(1).mean() for later in between[i:]]
            costs[i, i + 1 : fine] = (torch.stack(changes) * u.diff()[i:].to(data.device) / 2).cumsum(0)
    costs[:, fine] = costs[:, fine - 1]
    costs[fine - 1, fine] = 0
    return t_grid.tolist(), costs.cpu()


def _predictions(
    field: VelocityField, data: Tensor, cond: Cond, u: Tensor, seed: int, indices: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """D at the M values of u [M], and at M - 1 random values between them, on one path of noise per sample."""
    offsets = torch.tensor(uniforms(len(u) - 1, seed, "ays times"), dtype=torch.float64)
    chance = (
        offsets + GOLDEN * torch.tensor(indices, dtype=torch.float64)[:, None]
    ) % 1  # [n, M - 1], evenly spread over the samples
    points = torch.empty(2 * len(u) - 1, len(data), dtype=torch.float64)  # [2 M - 1, n], from noise to data
    points[::2], points[1::2] = u[:, None], (u[:-1] + chance * u.diff()).T
    times = (1 / (1 + points.sqrt())).to(data.device)
    kept = torch.cat([points[:-1] / points[1:], torch.zeros(1, len(data))]).to(data.device)  # (rho below / rho)^2
    seen, noise = [], torch.zeros_like(data)
    for k in reversed(range(len(points))):
        fresh = sample_noise(key(seed, "ays noise", k), indices, tuple(data.shape[1:])).to(data)
        noise = (
            like(kept[k].sqrt().to(data.dtype), data) * noise + like((1 - kept[k]).sqrt().to(data.dtype), data) * fresh
        )
        x = field.interpolant.mix(data, noise, times[k]).to(data.dtype)
        seen.append(field.interpolant.split(x, field(x, times[k], cond), times[k])[0].to(data.dtype))
    seen.reverse()
    return seen[::2], seen[1::2]
