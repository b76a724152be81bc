"""Kernel distance: the unbiased MMD^2 of two feature sets (Binkowski et al. 2018, arXiv 1801.01401, "KID").

torchmetrics' KID is not used for the reason given in `frechet`; it also draws random subsets.
"""

import torch
from torch import Tensor

CHUNK = 2048  # rows of a kernel matrix held at once


def kid(x: Tensor, y: Tensor) -> float:
    """MMD^2 with the kernel (x.y / D + 1)^3 for features x [N, D], y [M, D]; N, M >= 2.

    Its expectation is 0 for equal distributions. It uses all rows instead of the mean over random subsets: this has the
    same expectation, less variance, and needs no seed.
    """
    if min(x.shape[0], y.shape[0]) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features must be [N >= 2, D] and [M >= 2, D], got {list(x.shape)} and {list(y.shape)}")
    n, m = x.shape[0], y.shape[0]
    within_x = (_sum(x, x) - _kernel((x * x).sum(1).double(), x.shape[1]).sum()) / (n * (n - 1))
    within_y = (_sum(y, y) - _kernel((y * y).sum(1).double(), y.shape[1]).sum()) / (m * (m - 1))
    return (within_x + within_y - 2 * _sum(x, y) / (n * m)).item()


def _kernel(product: Tensor, dim: int) -> Tensor:
    return (product / dim + 1) ** 3


def _sum(x: Tensor, y: Tensor) -> Tensor:
    """The sum over the whole kernel matrix, float64."""
    y = y.double()
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in x.double().split(CHUNK):
        total += _kernel(rows @ y.T, x.shape[1]).sum()
    return total
