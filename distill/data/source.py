"""An endless stream of batches of real data, which any number of processes can read."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from distill.flow.draws import Rows, permutation
from distill.protocols import Batch


@runtime_checkable
class DataSet(Protocol):
    """Samples in [-1, 1] with class ids. A sample depends only on (epoch, index)."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...  # of one sample
    @property
    def num_classes(self) -> int | None: ...  # None: unconditional
    @property
    def digest(self) -> str: ...  # SHA-256 over samples, labels and the options that change them
    def __len__(self) -> int: ...
    def items(self, epoch: int, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]: ...

    # items returns images [n, ...] float32 in [-1, 1], and labels [n] int64 or None


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
        images: list[Tensor] = []
        labels: list[Tensor] = []
        while position < stop:
            epoch, first = divmod(position, n)
            last = min(n, first + stop - position)
            part, part_labels = self.data.items(epoch, _order(n, self.seed, epoch)[first:last].tolist())
            images.append(part)
            labels += [part_labels] if self.labels and part_labels is not None else []
            position += last - first
        return Batch(torch.cat(images), None, {"class_labels": torch.cat(labels)} if labels else {})
