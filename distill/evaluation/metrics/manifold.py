"""Improved precision and recall by nearest neighbours (Kynkaanniemi et al. 2019, arXiv 1904.06991).

torchmetrics does not have these metrics.
"""

import torch
from torch import Tensor

NEIGHBOURS = 3
CHUNK = 2048  # rows of a distance matrix held at once


def precision_recall(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Precision and recall of generated [N, D] against real [M, D].

    They are the fraction of generated samples inside the manifold of the real ones, and vice versa. A manifold is the
    union of balls around its samples; the radius of each is the distance to its k-th nearest other sample. The larger
    set is cut to the size of the smaller, because balls of a denser set are smaller. ValueError for at most k samples.
    """
    count = min(real.shape[0], generated.shape[0])
    if count <= k:
        raise ValueError(f"precision and recall with k = {k} need more than {k} samples, got {count}")
    real, generated = real[:count], generated[:count]
    return _covered(generated, real, k), _covered(real, generated, k)


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    points, centres = points.double(), centres.double()
    radii = [_squares(rows, centres).topk(k + 1, largest=False).values[:, k] for rows in centres.split(CHUNK)]
    inside = [(_squares(rows, centres) <= torch.cat(radii)).any(dim=1) for rows in points.split(CHUNK)]
    return torch.cat(inside).double().mean().item()


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [N, M]. Needs float64: for near neighbours |x|^2 - 2 x.y + |y|^2 cancels."""
    return torch.addmm(x.square().sum(1, keepdim=True) + y.square().sum(1), x, y.T, alpha=-2)
