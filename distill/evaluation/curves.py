"""Curves of logged values in bounded memory: at most two thousand points are drawn, even of a million.

If there are too many points, their range is divided into equal parts, and the smallest and the largest value of each
part are kept: the curve through them looks the same. The result depends only on the points.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

POINTS = 2000  # most points of a curve that is drawn
KEPT = 4 * POINTS  # most points of a curve while it is read
LARGEST = 1e100  # larger values would overflow in the limits of an axis


@dataclass
class Thinned:
    """The points of one curve, thinned while they are added. `at` increases."""

    at: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, at: float, value: float) -> None:
        """Add a point. Points at or after `at` are removed: a resumed run repeats what followed its checkpoint."""
        while self.at and self.at[-1] >= at:
            self.at.pop()
            self.values.pop()
        if abs(value) < LARGEST:  # false for infinity and NaN, which cannot be drawn
            self.at.append(at)
            self.values.append(value)
        if len(self.at) > KEPT:
            self.at, self.values = thin(self.at, self.values, POINTS)

    def drawn(self) -> tuple[list[float], list[float]]:
        """At most `POINTS` of the points."""
        return thin(self.at, self.values, POINTS) if len(self.at) > POINTS else (self.at, self.values)


def thin(at: Sequence[float], values: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """At most `most` points: those with the smallest and the largest value in each of most / 2 parts of the range.

    at, values: [N]; `at` must increase.
    """
    place, value = np.asarray(at), np.asarray(values)
    part = ((place - place[0]) / (place[-1] - place[0]) * (most // 2)).astype(np.int64).clip(max=most // 2 - 1)  # [N]
    order = np.lexsort((value, part))  # by part, then by value; equal values stay in order
    first = np.flatnonzero(np.diff(part[order], prepend=-1))  # start of each part
    last = np.append(first[1:], len(order)) - 1
    kept = np.unique(order[np.concatenate([first, last])])
    return place[kept].tolist(), value[kept].tolist()
