"""The KL divergence between histograms of points in the plane, as published for the checkerboard.

The definition is that of github.com/NathanVanier/flow-map-self-distillation: KL(exact || generated), in nats, of two
histograms with 50 x 50 bins on [-2.5, 2.5]^2. Each histogram is divided by the number of its points within this square,
and 1e-8 is added to each bin. So points outside of the square do not count, and a bin that only exact samples reach
counts with about p ln(p / 1e-8). Two sets of N exact samples differ by about (K - 1) / N, where K is the number of bins
that the law reaches: 800 for the checkerboard, so 0.016 for 50,000 samples.
"""

import torch
from torch import Tensor

BINS, LIMIT, ADDED = 50, 2.5, 1e-8


def histogram(points: Tensor) -> Tensor:
    """The fraction in each bin of the points [N, 2] within the square: [50, 50] float64, all 0 if none is within it.

    ValueError unless points are in the plane.
    """
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points must be [N, 2], got {list(points.shape)}")
    points = points.double().cpu()
    places = ((points + LIMIT) * (BINS / (2 * LIMIT))).floor()
    within = ((places >= 0) & (places < BINS)).all(1)
    column, row = places[within].long().unbind(1)
    counts = torch.bincount(column * BINS + row, minlength=BINS**2).double()
    return counts.view(BINS, BINS) / max(1, int(within.sum()))


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of two histograms, in nats, after 1e-8 is added to each bin of both."""
    p, q = p + ADDED, q + ADDED
    return float((p * (p / q).log()).sum())


def histogram_kl(exact: Tensor, generated: Tensor) -> float:
    """KL(exact || generated) of the histograms of two sets of points [N, 2] and [M, 2]."""
    return divergence(histogram(exact), histogram(generated))
