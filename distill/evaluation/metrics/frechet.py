"""Frechet distance between Gaussians fitted to two feature sets (Heusel et al. 2017, arXiv 1706.08500).

torchmetrics' FID is not used because it takes images and computes features itself, while here the features of a set are
computed once for several metrics. All is computed in float64: differences of means cancel, and the square root of a
covariance with small eigenvalues loses half of the digits.
"""

import torch
from torch import Tensor


def frechet(x: Tensor, y: Tensor) -> float:
    """|m_x - m_y|^2 + Tr(S_x + S_y - 2 (S_x S_y)^(1/2)) for features x [N, D], y [M, D]; N, M >= 2.

    The estimate is biased upwards by O(1/N): compare only values from equal numbers of samples.
    """
    (mean_x, cov_x), (mean_y, cov_y) = _moments(x), _moments(y)
    return gaussian_frechet(mean_x, cov_x, mean_y, cov_y)


def gaussian_frechet(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    """The same distance from moments: means [D], covariances [D, D]."""
    root = _sqrt(cov_x.double())
    middle = root @ cov_y.double() @ root  # symmetric, with the eigenvalues of S_x S_y
    trace = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp(min=0).sqrt().sum()
    squared = (mean_x.double() - mean_y.double()).square().sum() + cov_x.trace() + cov_y.trace() - 2 * trace
    return max(squared.item(), 0.0)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or x.shape[0] < 2:
        raise ValueError(f"features must be [N >= 2, D], got {list(x.shape)}")
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (x.shape[0] - 1)


def _sqrt(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
