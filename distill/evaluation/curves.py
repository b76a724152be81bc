"""Numbers that a run has logged, in bounded memory: a million of them are drawn by two thousand.

Where there are too many, the range is divided into equal parts, and of each the smallest and the largest stay: a curve
through them looks the same. The rule depends on nothing but the numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

POINTS = 2000  # of a curve that is drawn
KEPT = 4 * POINTS  # of a curve while it is read, before it is thinned
LARGEST = 1e100  # beyond it, the ends of an axis overflow


@dataclass
class Thinned:
    """The points of one curve, as they come; `at` rises."""

    at: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, at: float, value: float) -> None:
        """The next point. A resumed run repeats what came after its checkpoint; the later numbers count."""
        while self.at and self.at[-1] >= at:
            self.at.pop()
            self.values.pop()
        if abs(value) < LARGEST:  # neither infinite nor not a number: nothing else can be drawn
            self.at.append(at)
            self.values.append(value)
        if len(self.at) > KEPT:
            self.at, self.values = thin(self.at, self.values, POINTS)

    def drawn(self) -> tuple[list[float], list[float]]:
        """At most POINTS of them."""
        return thin(self.at, self.values, POINTS) if len(self.at) > POINTS else (self.at, self.values)


def thin(at: Sequence[float], values: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """Of each of most / 2 equal parts of the range of `at`, which rises, the smallest and the largest value [N]."""
    place, value = np.asarray(at), np.asarray(values)
    part = ((place - place[0]) / (place[-1] - place[0]) * (most // 2)).astype(np.int64).clip(max=most // 2 - 1)  # [N]
    order = np.lexsort((value, part))  # by part, in each from the smallest on; of equal ones the first comes first
    first = np.flatnonzero(np.diff(part[order], prepend=-1))  # where each part begins
    last = np.append(first[1:], len(order)) - 1
    kept = np.unique(order[np.concatenate([first, last])])
    return place[kept].tolist(), value[kept].tolist()
