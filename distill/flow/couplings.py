"""Which noise goes with which data: couplings of training samples, for flow matching on straighter paths.

data and noise are [B, ...], rows of the global batch. Rows are matched, or weighted, within blocks of `block`
consecutive ones, B a multiple of it: a block sees nothing outside, so it is coupled alike on whatever rank and in
whatever micro-batch it lies. Distances are found where the samples are, in float32 or float64 whatever the autocast;
plans on the CPU in float64. Nothing here has gradients.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from distill.core.errors import InputError, RunError
from distill.flow.interpolants import like

Matched = tuple[Tensor, Tensor]  # rows of data and the rows of the noise that goes with them, each [B] int64


def ot(data: Tensor, noise: Tensor, u: Tensor, block: int, labels: Tensor | None) -> Matched:
    """The permutation of the noise with the least sum of squared distances (Tong et al. 2023, arXiv 2302.00482)."""
    return torch.arange(len(data)), assignment(costs(data, noise, block, labels).square())


def ot_replacement(data: Tensor, noise: Tensor, u: Tensor, block: int, labels: Tensor | None) -> Matched:
    """As many pairs drawn, by uniform u [B], from the plan of least mean squared distance."""
    return drawn(plans(costs(data, noise, block, labels).square()), u)


def immiscible(data: Tensor, noise: Tensor, u: Tensor, block: int, labels: Tensor | None) -> Matched:
    """The permutation of the noise with the least sum of distances (Li et al. 2024, arXiv 2406.12303)."""
    return torch.arange(len(data)), assignment(costs(data, noise, block, labels))


Matching = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Matched]
MATCHINGS: dict[str, Matching] = {"ot": ot, "ot_replacement": ot_replacement, "immiscible": immiscible}


def nearest(data: Tensor, noise: Tensor, more: Iterable[Tensor]) -> Tensor:
    """Of the noises of each sample the nearest to it, [B, ...]; of equally near ones the first."""
    least = distance(data, noise)
    for other in more:
        length = distance(data, other)
        noise = torch.where(like(length < least, noise), other, noise)
        least = torch.minimum(least, length)
    return noise


def gibbs_weights(cost: Tensor, block: int, epsilon: float | None) -> tuple[Tensor, Tensor]:
    """w = exp(-cost / epsilon) over its mean in the block, [B], and the effective share of the samples,
    (sum w)^2 / (block sum w^2), a mean over blocks: 1 where all weights are equal.

    epsilon None: twice the block's median cost.
    """
    cost = in_blocks(cost, block)
    scale = 2 * cost.median(1, keepdim=True).values if epsilon is None else epsilon
    weights = block * (-cost / scale).softmax(1)
    return weights.flatten(), (block / weights.square().sum(1)).mean()


def distance(data: Tensor, noise: Tensor) -> Tensor:
    """||data_i - noise_i||, [B]."""
    return (_flat(data) - _flat(noise)).norm(dim=1)


def costs(data: Tensor, noise: Tensor, block: int, labels: Tensor | None = None) -> Tensor:
    """||data_i - noise_j|| of all rows i, j of each block, [B / block, block, block] float64 on the CPU.

    labels [B]: rows of different ones are infinitely far from each other.
    """
    sides = (in_blocks(_flat(side), block) for side in (data, noise))
    found = torch.cdist(*sides, compute_mode="donot_use_mm_for_euclid_dist").to("cpu", torch.float64)
    if not found.isfinite().all():
        raise RunError("the data, which is to be coupled with noise, is not finite; look for nan or inf in it")
    if labels is not None:
        theirs = in_blocks(labels.cpu(), block)
        found = found.masked_fill(theirs[:, :, None] != theirs[:, None, :], torch.inf)
    return found


def assignment(cost: Tensor) -> Tensor:
    """The permutation in each block of least total cost [B / block, block, block], as rows [B]. Infinite: never."""
    from scipy.optimize import linear_sum_assignment  # takes a third of a second, and few need it

    return _rows([linear_sum_assignment(each)[1] for each in cost.numpy()])


def plans(cost: Tensor) -> Tensor:
    """The exact plan of least mean cost between uniform weights in each block, [B / block, block, block], of sum 1."""
    from ot import emd  # takes more than a second, and few need it

    found = []
    for each in cost.numpy():
        # The network simplex knows no infinite cost; one above that of any finite permutation does the same.
        finite = np.where(np.isinf(each), len(each) * each[np.isfinite(each)].max() + 1, each)
        plan, log = emd([], [], finite, numItermax=10**9, log=True)
        assert log["result_code"] == 1, log["warning"]
        found.append(torch.from_numpy(plan))
    return torch.stack(found)


def drawn(plan: Tensor, u: Tensor) -> Matched:
    """Pairs drawn with replacement from each block's plan [B / block, block, block] by its part of uniform u [B]."""
    block = plan.shape[1]
    mass = plan.flatten(1).cumsum(1)
    draws = in_blocks(u.cpu().double(), block) * mass[:, -1:]
    found = torch.searchsorted(mass, draws, right=True)  # of pairs without mass, none
    return _rows(found // block), _rows(found % block)


def in_blocks(rows: Tensor, block: int) -> Tensor:
    """[B, ...] -> [B / block, block, ...]."""
    if len(rows) % block:
        raise InputError(
            f"a micro-batch of {len(rows)} samples does not hold whole blocks of {block}, whose samples are coupled "
            "with each other; change batch_size, launch.micro_batch or the size of a block"
        )
    return rows.reshape(-1, block, *rows.shape[1:])


def _flat(samples: Tensor) -> Tensor:
    """[B, ...] -> [B, d] in float32 or float64, detached."""
    samples = samples.detach().flatten(1)
    return samples if samples.dtype == torch.float64 else samples.float()


def _rows(within: Iterable[np.ndarray | Tensor]) -> Tensor:
    """Rows within each block -> rows of the micro-batch [B]."""
    return torch.cat([torch.as_tensor(rows) + i * len(rows) for i, rows in enumerate(within)])
