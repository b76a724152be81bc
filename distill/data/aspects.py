"""Which bucket an image belongs to: the one whose aspect ratio is nearest to its own."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-9  # relative difference of aspect ratios that counts as none
BLOCK = 2**16  # images that are processed together


def nearest(sides: NDArray[np.int32], sizes: Sequence[tuple[int, int]]) -> NDArray[np.int16]:
    """For each image, the position in `sizes` of the bucket with the nearest logarithm of the aspect ratio, [N].

    Of two buckets that are equally near, it is the one that is nearer to a square, or else the wider one.

    sides: height and width of the images, [N, 2]. sizes: height and width of the buckets, from the widest to the
    highest, no two of the same aspect ratio.
    """
    aspects = np.array([height / width for height, width in sizes])
    low, high = aspects[:-1], aspects[1:]
    # Images with a lower aspect ratio than the geometric mean of two buckets belong to the wider one.
    squarer = np.abs(np.log(high)) < np.abs(np.log(low)) * (1 - ROUNDING)
    means = np.sqrt(low * high) * np.where(squarer, 1 - ROUNDING, 1 + ROUNDING)
    found = np.empty(len(sides), np.int16)
    for start in range(0, len(sides), BLOCK):
        height, width = sides[start : start + BLOCK].T
        found[start : start + BLOCK] = np.searchsorted(means, height / width.clip(1), side="right")
    return found
