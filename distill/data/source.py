"""An endless stream of batches of real data, which any number of processes can read."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from distill.flow.draws import Rows, permutation
from distill.protocols import Batch


class Items(NamedTuple):
    """Some samples of a data set."""

    samples: Tensor  # [n, ...] float32: pixels in [-1, 1], or latents
    labels: Tensor | None = None  # [n] int64: class ids, or numbers of prompts; None: unconditional
    sizes: Tensor | None = None  # [n, 6] int64, see `protocols.Conditioning`


@runtime_checkable
class DataSet(Protocol):
    """Samples with labels. A sample depends only on (epoch, index)."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...  # of one sample
    @property
    def num_classes(self) -> int | None: ...  # None: unconditional
    @property
    def digest(self) -> str: ...  # SHA-256 over samples, labels and the options that change them
    def __len__(self) -> int: ...
    def items(self, epoch: int, indices: Sequence[int]) -> Items: ...


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    return permutation(n, seed, epoch)


class DataSource:
    """A stream of batches of size B. Implements `protocols.Source`.

    The stream is a concatenation of epochs. Each epoch is a permutation of the data set, keyed by (seed, epoch). The
    batch of step k holds the positions [k B, (k+1) B), so it may span two or more epochs. Any process can read any rows
    of any step.
    """

    def __init__(self, data: DataSet, batch_size: int, seed: int, *, labels: bool = True) -> None:
        self.data, self.batch_size, self.seed, self.labels = data, batch_size, seed, labels

    def batch(self, step: int, rows: Rows) -> Batch:
        """Returns these rows of the global batch of `step`, on the CPU."""
        if rows.total != self.batch_size:
            raise ValueError(
                f"rows of a batch of {rows.total} were asked from a source of batches of {self.batch_size}"
            )
        n = len(self.data)
        position, stop = step * self.batch_size + rows.start, step * self.batch_size + rows.stop
        parts: list[Items] = []
        while position < stop:
            epoch, first = divmod(position, n)
            last = min(n, first + stop - position)
            parts.append(self.data.items(epoch, _order(n, self.seed, epoch)[first:last].tolist()))
            position += last - first
        cond = {}
        if self.labels:
            found = {"class_labels": [each.labels for each in parts], "sizes": [each.sizes for each in parts]}
            cond = {
                name: torch.cat(known) for name, each in found.items() if (known := [t for t in each if t is not None])
            }
        return Batch(torch.cat([each.samples for each in parts]), None, cond)
