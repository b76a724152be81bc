"""Couplings: which noise is paired with which data sample, for flow matching on straighter paths.

`data` and `noise` are [B, ...], rows of the global batch. Rows are matched or weighted within blocks of `block`
consecutive rows, and B must be a multiple of `block`. A block does not depend on rows outside it, so the result is the
same on every rank and for every micro-batch size. Distances are computed on the device of the samples in float32 or
float64, also under autocast. Transport plans are computed on the CPU in float64. Results have no gradient.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from distill.core.errors import InputError, RunError
from distill.flow.interpolants import like

Matched = tuple[Tensor, Tensor]  # row indices of the data, and of the noise paired with them, each [B] int64


def ot(data: Tensor, noise: Tensor, u: Tensor, block: int, labels: Tensor | None) -> Matched:
    """Permutes the noise so that the sum of squared distances is minimal (Tong et al. 2023, arXiv 2302.00482)."""
    return torch.arange(len(data)), assignment(costs(data, noise, block, labels).square())


def ot_replacement(data: Tensor, noise: Tensor, u: Tensor, block: int, labels: Tensor | None) -> Matched:
    """Draws B pairs, by uniform numbers u [B], from the plan with the minimum mean squared distance."""
    return drawn(plans(costs(data, noise, block, labels).square()), u)


def immiscible(data: Tensor, noise: Tensor, u: Tensor, block: int, labels: Tensor | None) -> Matched:
    """Permutes the noise so that the sum of distances is minimal (Li et al. 2024, arXiv 2406.12303)."""
    return torch.arange(len(data)), assignment(costs(data, noise, block, labels))


Matching = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Matched]
MATCHINGS: dict[str, Matching] = {"ot": ot, "ot_replacement": ot_replacement, "immiscible": immiscible}


def nearest(data: Tensor, noise: Tensor, more: Iterable[Tensor]) -> Tensor:
    """Returns for each sample the nearest of its candidates `noise` and `more` [B, ...]; the first one if they tie."""
    least = distance(data, noise)
    for other in more:
        length = distance(data, other)
        noise = torch.where(like(length < least, noise), other, noise)
        least = torch.minimum(least, length)
    return noise


def gibbs_weights(cost: Tensor, block: int, epsilon: float | None) -> tuple[Tensor, Tensor]:
    """Returns weights w = exp(-cost / epsilon) [B], divided by their mean in each block, and the effective sample size.

    The effective sample size is given as a share of the samples, (sum w)^2 / (block sum w^2), averaged over blocks. It
    is 1 if all weights are equal. epsilon None: twice the median cost of the block.
    """
    cost = in_blocks(cost, block)
    scale = 2 * cost.median(1, keepdim=True).values if epsilon is None else epsilon
    weights = block * (-cost / scale).softmax(1)
    return weights.flatten(), (block / weights.square().sum(1)).mean()


def distance(data: Tensor, noise: Tensor) -> Tensor:
    """||data_i - noise_i||, [B]."""
    return (_flat(data) - _flat(noise)).norm(dim=1)


def costs(data: Tensor, noise: Tensor, block: int, labels: Tensor | None = None) -> Tensor:
    """||data_i - noise_j|| for all rows i, j of each block, [B / block, block, block] float64 on the CPU.

    labels [B]: the distance between rows with different labels is set to infinity. Raises RunError if the samples are
    not finite.
    """
    sides = (in_blocks(_flat(side), block) for side in (data, noise))
    found = torch.cdist(*sides, compute_mode="donot_use_mm_for_euclid_dist").to("cpu", torch.float64)
    if not found.isfinite().all():
        raise RunError("the data or the noise to be coupled contains NaN or infinity; check the data")
    if labels is not None:
        theirs = in_blocks(labels.cpu(), block)
        found = found.masked_fill(theirs[:, :, None] != theirs[:, None, :], torch.inf)
    return found


def assignment(cost: Tensor) -> Tensor:
    """Solves the assignment problem of each block: cost [B / block, block, block] -> row indices [B].

    Pairs of infinite cost are never assigned.
    """
    from scipy.optimize import linear_sum_assignment  # imported here because it takes a third of a second

    return _rows([linear_sum_assignment(each)[1] for each in cost.numpy()])


def plans(cost: Tensor) -> Tensor:
    """The optimal transport plan between uniform weights in each block, [B / block, block, block]; each sums to 1."""
    from ot import emd  # imported here because it takes more than a second

    found = []
    for each in cost.numpy():
        # The network simplex does not support infinite costs. A cost above that of every finite permutation is
        # avoided just as well.
        finite = np.where(np.isinf(each), len(each) * each[np.isfinite(each)].max() + 1, each)
        plan, log = emd([], [], finite, numItermax=10**9, log=True)
        assert log["result_code"] == 1, log["warning"]
        found.append(torch.from_numpy(plan))
    return torch.stack(found)


def drawn(plan: Tensor, u: Tensor) -> Matched:
    """Draws pairs with replacement from the plan [B / block, block, block] of each block, by uniform numbers u [B]."""
    block = plan.shape[1]
    mass = plan.flatten(1).cumsum(1)
    draws = in_blocks(u.cpu().double(), block) * mass[:, -1:]
    found = torch.searchsorted(mass, draws, right=True)  # right=True: pairs without mass are never drawn
    return _rows(found // block), _rows(found % block)


def in_blocks(rows: Tensor, block: int) -> Tensor:
    """[B, ...] -> [B / block, block, ...]. Raises InputError if B is not a multiple of `block`."""
    if len(rows) % block:
        raise InputError(
            f"a micro-batch of {len(rows)} samples is not a multiple of the block size {block} (samples are "
            "coupled within blocks); change batch_size, launch.micro_batch or the block size"
        )
    return rows.reshape(-1, block, *rows.shape[1:])


def _flat(samples: Tensor) -> Tensor:
    """[B, ...] -> [B, d] in float32 or float64, detached."""
    samples = samples.detach().flatten(1)
    return samples if samples.dtype == torch.float64 else samples.float()


def _rows(within: Iterable[np.ndarray | Tensor]) -> Tensor:
    """Converts row indices within each block to row indices of the micro-batch [B]."""
    return torch.cat([torch.as_tensor(rows) + i * len(rows) for i, rows in enumerate(within)])
