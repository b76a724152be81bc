"""Sliced Wasserstein-2 distance between two sets of vectors (Bonneel et al. 2015), computed by POT."""

from torch import Tensor

PROJECTIONS, SEED = 256, 0


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """Square root of the mean over directions of the squared 1-D W2 distance between x [N, D] and y [M, D].

    The random directions are always the same. ValueError unless both are matrices with the same D.
    """
    import ot  # imported here because it takes more than a second, and only runs on vectors need it

    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"vectors must be [N, D] and [M, D], got {list(x.shape)} and {list(y.shape)}")
    a, b = x.double().cpu().numpy(), y.double().cpu().numpy()
    return float(ot.sliced_wasserstein_distance(a, b, n_projections=PROJECTIONS, seed=SEED, p=2))
