"""The checkerboard: a law in the plane with sharp edges, for which samples can be drawn at will."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from distill.data import KindLoader
from distill.data.source import Items
from distill.flow import philox
from distill.flow.draws import key
from distill.spec.builtindata import CheckerboardData

COUNT = 65_536  # samples of an epoch
CELLS = 4  # squares of side 1 in a row and in a column of the board
COLOURED = [(column, row) for column in range(CELLS) for row in range(CELLS) if (column + row) % 2 == 0]


def draw(seed: int, count: int) -> Tensor:
    """The first `count` samples [count, 2] float32 of a seed, in [-2, 2)^2; each depends on the seed and its number."""
    u = philox.uniform(seed, range(count), 3, torch.device("cpu"))  # which square, and where in it
    squares = torch.tensor(COLOURED, dtype=torch.float32)
    return squares[(u[:, 0] * len(COLOURED)).long()] + u[:, 1:] - CELLS / 2


class Checkerboard:
    """Uniform on the eight squares of one colour of a board of 4 x 4 squares. Implements `source.DataSet`, `Drawable`.

    Each epoch has other samples, so that no sample is seen twice.
    """

    name, shape, buckets, num_classes, prompts, encoded = "checkerboard", (2,), None, None, None, False

    def __init__(self, seed: int) -> None:
        self.digest = hashlib.sha256(f"checkerboard {seed}".encode()).hexdigest()
        self._epoch = lru_cache(maxsize=1)(lambda epoch: draw(key("checkerboard", seed, epoch), COUNT))

    def __len__(self) -> int:
        return COUNT

    def items(self, epoch: int, indices: Sequence[int]) -> Items:
        """Returns samples [n, 2] without labels."""
        return Items(self._epoch(epoch)[list(indices)])

    def draw(self, seed: int, count: int) -> Tensor:
        """Independent samples [count, 2] of another seed."""
        return draw(seed, count)


class _Drawn:
    """Loads the data set of this module. Implements `data.KindLoader`."""

    def load(
        self, spec: CheckerboardData, seed: int, folder: Path | None, *, keep: bool, indexed: bool
    ) -> Checkerboard:
        """See `data.load_data`. Other arguments than the seed have no effect."""
        return Checkerboard(seed)

    def update_index(self, spec: CheckerboardData, store: Path, run: Path | None) -> None:
        """Does nothing: this data set has no index."""


LOADER: KindLoader[CheckerboardData] = _Drawn()
