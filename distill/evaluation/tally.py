"""What the columns of a row are computed from: sums over its samples, added block by block, in the order of the blocks.

So memory does not grow with the number of samples, except by the scores of a user's metrics, one number for each
sample, and by samples of vectors, which the sliced Wasserstein distance compares as a whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from distill.core.errors import RunError

MOST_COMPARED = 5_000  # most samples of a set for metrics whose time grows with the square of their number


class FeatureSums:
    """The mean and the covariance of features [N, D], in float64, and the features of the first samples.

    centre: [D], near the mean: sums are those of the differences from it, so that they lose no digits.
    whole: keep the features of all samples, and no covariance.
    """

    def __init__(self, centre: Tensor, *, whole: bool = False) -> None:
        self.count, self.whole, self._centre = 0, whole, centre.double()
        self._first: list[Tensor] = []
        if not whole:
            size = len(centre)
            self._sum = torch.zeros(size, dtype=torch.float64)
            self._products = torch.zeros(size, size, dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor, *, whole: bool = False) -> Self:
        """Those of a set that is in memory."""
        found = cls(features.double().mean(0), whole=whole)
        found.add(features)
        return found

    def like(self) -> "FeatureSums":
        """Empty ones, to be compared with these."""
        return FeatureSums(self.mean if not self.whole else self._centre, whole=self.whole)

    def add(self, features: Tensor) -> None:
        """Add the features of the next samples [n, D]."""
        left = len(features) if self.whole else max(0, MOST_COMPARED - self.count)
        if left:
            self._first.append(features[:left].clone())
        self.count += len(features)
        if not self.whole:
            away = features.double() - self._centre
            self._sum += away.sum(0)
            self._products += away.T @ away

    @property
    def mean(self) -> Tensor:
        """[D]"""
        return self._centre + self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """[D, D], of N - 1 degrees of freedom. ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples or more, got {self.count}")
        return (self._products - torch.outer(self._sum, self._sum) / self.count) / (self.count - 1)

    @property
    def first(self) -> Tensor:
        """The features of the first samples, at most `MOST_COMPARED`, or of all if these are `whole`."""
        return torch.cat(self._first)


@dataclass(frozen=True)
class SeenBlock:
    """What a row needs of a block of consecutive samples.

    shown: the ones that are shown, as pixels or vectors, [n, ...]. features: see `Reference.embed`; None: there is
    nothing to compare with. judged: what each of the user's metrics says of them, by name. squared_error: the sum over
    all their numbers of the squared distance from the samples of the fine solver. squared_path: the same from their
    noises. seconds: to make all of them. calls: of the network for each, if they differ.
    """

    count: int
    numbers: int
    shown: Tensor | None
    features: Tensor | None
    judged: Mapping[str, Tensor]
    squared_error: float
    squared_path: float
    seconds: float
    calls: Tensor | None


@dataclass
class RowSums:
    """The sums over the samples of a row.

    total: how many there will be. features: empty sums, like those of the reference; None: there is none. texts: how
    many prompts samples use in turn. real: of the metrics whose features of real images are known, empty sums like
    those.
    """

    total: int
    features: FeatureSums | None = None
    texts: int = 1
    real: Mapping[str, FeatureSums] = field(default_factory=dict)
    count: int = 0
    numbers: int = 0
    squared_error: float = 0.0
    squared_path: float = 0.0
    seconds: float = 0.0
    shown: list[Tensor] = field(default_factory=list)
    calls: list[Tensor] = field(default_factory=list)
    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    embedded: dict[str, FeatureSums] = field(default_factory=dict)
    repeated: dict[str, list[Tensor]] = field(default_factory=dict)
    """of metrics that return features: those of the samples of the first prompts"""

    def add(self, block: SeenBlock) -> None:
        """Add the next block."""
        if block.shown is not None:
            self.shown.append(block.shown)
        if self.features is not None and block.features is not None:
            self.features.add(block.features)
        for name, values in block.judged.items():
            if name in (self.embedded if values.ndim == 1 else self.scores):
                raise RunError(f"the metric {name} returned scores for some images, and features for others")
            if values.ndim == 1:
                self.scores.setdefault(name, []).append(values)
                continue
            if name not in self.embedded:
                self.embedded[name] = self.real.get(name) or FeatureSums(values.double().mean(0))
            self.embedded[name].add(values)
            few = self._few
            of_few = [row for row in range(len(values)) if (self.count + row) % self.texts < few]
            self.repeated.setdefault(name, []).append(values[of_few])
        if block.calls is not None:
            self.calls.append(block.calls)
        self.count += block.count
        self.numbers += block.numbers
        self.squared_error += block.squared_error
        self.squared_path += block.squared_path
        self.seconds += block.seconds

    def by_text(self, metric: str) -> list[Tensor]:
        """The features of the samples of each prompt that has several, of the first prompts; see `repeated`."""
        values = torch.cat(self.repeated[metric])
        texts = torch.tensor([number % self.texts for number in range(self.total) if number % self.texts < self._few])
        return [own for text in range(self._few) if len(own := values[texts == text]) > 1]

    @property
    def _few(self) -> int:
        """Of how many prompts, the first ones, samples are compared with each other."""
        each = -(-self.total // self.texts)
        return max(1, min(self.texts, MOST_COMPARED // each))
