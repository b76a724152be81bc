"""Numbers that a run has logged, in bounded memory: a million of them are drawn by two thousand. No torch.

Where there are too many, the range is divided into equal parts, and of each the smallest and the largest stay: a curve
through them looks the same. The rule depends on nothing but the numbers.
"""

from dataclasses import dataclass, field

POINTS = 2000  # of a curve that is drawn
KEPT = 2 * POINTS  # of a curve while it is read, before it is thinned
LARGEST = 1e100  # beyond it, the ends of an axis overflow

Point = tuple[float, float]


@dataclass
class Thinned:
    """The points of one curve, as they come."""

    points: list[Point] = field(default_factory=list)

    def add(self, at: float, value: float) -> None:
        """The next point. A resumed run repeats what came after its checkpoint; the later numbers count."""
        while self.points and self.points[-1][0] >= at:
            self.points.pop()
        if abs(value) < LARGEST:  # neither infinite nor not a number: nothing else can be drawn
            self.points.append((at, value))
        if len(self.points) > KEPT:
            self.points = thin(self.points)

    def drawn(self) -> list[Point]:
        """At most POINTS of them, from left to right."""
        return thin(self.points) if len(self.points) > POINTS else self.points


def thin(points: list[Point], most: int = POINTS) -> list[Point]:
    """The smallest and the largest value of each of most / 2 equal parts of the range; `at` rises in `points`."""
    parts = most // 2
    first, last = points[0][0], points[-1][0]
    lows: dict[int, Point] = {}
    highs: dict[int, Point] = {}
    for point in points:
        part = min(parts - 1, int((point[0] - first) / (last - first) * parts))
        if part not in lows or point[1] < lows[part][1]:
            lows[part] = point
        if part not in highs or point[1] > highs[part][1]:
            highs[part] = point
    return sorted({*lows.values(), *highs.values()})
