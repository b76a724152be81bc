"""Policies: velocities for a whole interval of times, from the outputs of one network call at its start.

From (x_r, r) the network gives M outputs [B, M, ...], each like x_r. A policy makes of them a velocity at every later
state x and time t <= r. Following it needs no further network call. There are three:

steps: outputs are the velocities on the M intervals of a grid of times (PDD, Shaul et al. 2026, arXiv 2607.26004).
data: outputs are predictions of the data at M evenly spaced times from r to the end of the interval; in between they
    are interpolated, and v = (x - data) / t (pi-Flow's DX policy, Chen et al. 2025, arXiv 2510.14974).
gaussian: the 2 K + 1 outputs describe a mixture of K Gaussians, the law of the data given x_r (pi-Flow's GM policy).
    The first K are their means, as velocities; the channel means of the next K are the logarithms of their weights; the
    mean of the last one is ln(std / r). At (x, t), v = (x - E[data | x]) / t, where the Gaussians are those of x_r,
    given x as well.

This file is shipped inside student folders: it imports torch only.
"""

import torch
from torch import Tensor

SUBSTEPS = 32  # midpoint steps in which a policy is followed over an interval


def outputs_of(policy: str, count: int) -> int:
    """The number of outputs M of a policy with `count` velocities, data predictions or Gaussians."""
    return 2 * count + 1 if policy == "gaussian" else count


def called(
    policy: str,
    grid: list[float] | None,
    outputs: Tensor,
    sample: Tensor,
    timestep: Tensor | float | int,
    target_timestep: Tensor | float | int,
) -> Tensor:
    """`average_velocity`, for timestep = 1000 r and target_timestep = 1000 s (numbers or [B])."""
    r, s = (
        torch.as_tensor(each, dtype=torch.float32, device=sample.device).expand(sample.shape[0]) / 1000
        for each in (timestep, target_timestep)
    )
    times = torch.tensor(grid or [], dtype=torch.float64, device="cpu")
    return average_velocity(policy, times, outputs.to(sample.dtype), sample, r, s)


def average_velocity(policy: str, grid: Tensor, outputs: Tensor, x_r: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """The average velocity [B, ...] of a policy from x_r [B, ...] at r [B] to s [B] <= r.

    grid: [M + 1] float64, decreasing, of steps; others do not use it. outputs: [B, M, ...].
    """
    if policy == "steps":
        weights = overlaps(grid, r, s).to(outputs.dtype)  # [B, M]
        return (weights.reshape(*weights.shape, *[1] * (x_r.ndim - 1)) * outputs).sum(1)
    x_s = follow(policy, outputs, x_r, r, s, x_r, r, s, SUBSTEPS)
    gap = wide(torch.where(r == s, torch.ones_like(r), r - s), x_r)
    return torch.where(wide(r == s, x_r), velocity_at(policy, outputs, x_r, r, s, x_r, r), (x_r - x_s) / gap)


def overlaps(grid: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """The part of [s, r] that lies in each interval of a decreasing grid [M + 1]: [B, M] float64. They add up to 1.

    Where r = s, it is 1 for the interval that begins there, or that contains it.
    """
    grid, r, s = grid.to(r.device), r.double()[:, None], s.double()[:, None]
    starts, ends = grid[:-1], grid[1:]
    length = (torch.minimum(r, starts) - torch.maximum(s, ends)).clamp(min=0)
    here = ((r <= starts + 1e-6) & ((r > ends + 1e-6) | (ends == grid[-1]))).double()
    return torch.where(r - s > 1e-6, length / (r - s).clamp(min=1e-6), here)


def follow(
    policy: str, outputs: Tensor, x_r: Tensor, r: Tensor, end: Tensor, x: Tensor, t: Tensor, s: Tensor, substeps: int
) -> Tensor:
    """The state [B, ...] at s [B] of the path of a policy data or gaussian that is at x [B, ...] at t [B], with s <= t.

    x_r, r: where the network was called. end: [B], the end of the interval.
    """
    for i in range(substeps):
        middle = t + (s - t) * ((i + 0.5) / substeps)
        v = velocity_at(policy, outputs, x_r, r, end, x, t + (s - t) * (i / substeps))
        v = velocity_at(policy, outputs, x_r, r, end, x + wide((s - t) / (2 * substeps), x) * v, middle)
        x = x + wide((s - t) / substeps, x) * v
    return x


def velocity_at(policy: str, outputs: Tensor, x_r: Tensor, r: Tensor, end: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The velocity [B, ...] of a policy data or gaussian at x [B, ...] and t [B] in (0, r]. See `follow`."""
    if policy == "data":
        last = outputs.shape[1] - 1
        place = ((r - t) / (r - end).clamp(min=1e-6)).clamp(0, 1) * last  # [B]
        left = place.floor().clamp(max=max(last - 1, 0)).long()
        rows, part = torch.arange(len(x), device=x.device), wide(place - left, x)
        data = (1 - part) * outputs[rows, left] + part * outputs[rows, (left + 1).clamp(max=last)]
        return (x - data) / wide(t, x)
    count = (outputs.shape[1] - 1) // 2
    inner = wide(r, outputs)
    means = x_r[:, None] - inner * outputs[:, :count]  # [B, K, ...], of the data
    weights = outputs[:, count:-1].mean(2, keepdim=True)  # [B, K, 1, ...]
    variance = wide(r.square() * (2 * outputs[:, -1].flatten(1).mean(1)).exp(), outputs)  # [B, 1, 1, ...]
    # x = (1 - t) data + t noise, so x has the likelihood of data of precision ((1 - t) / t)^2; x_r has its own already
    signal, at_r = (1 - t) / t, (1 - r) / r
    zeta = wide((signal.square() - at_r.square()).clamp(min=0), outputs)
    nu = wide(signal / t, x) * x - wide(at_r / r, x) * x_r  # [B, ...]
    total = 1 + variance * zeta
    fit = (means * (nu[:, None] - zeta * means / 2)).sum(2, keepdim=True) / total
    share = (weights + fit).softmax(1)  # [B, K, 1, ...]
    data = (share * (variance * nu[:, None] + means) / total).sum(1)
    return (x - data) / wide(t, x)


def wide(values: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1] with as many dimensions as x, in its dtype unless it is bool."""
    values = values.reshape(-1, *[1] * (x.ndim - 1))
    return values if values.dtype == torch.bool else values.to(x.dtype)
