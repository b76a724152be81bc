"""Batches of real data: one endless stream, any number of readers."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from distill.flow.draws import Rows, permutation
from distill.protocols import Batch


@runtime_checkable
class DataSet(Protocol):
    """Samples in [-1, 1] with their class ids, each a function of (epoch, index) alone."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...  # of one sample
    @property
    def num_classes(self) -> int | None: ...  # None: unconditional
    @property
    def digest(self) -> str: ...  # sha256 over samples, labels and the options that change them
    def __len__(self) -> int: ...
    def items(self, epoch: int, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]: ...

    # -> images [n, ...] float32 in [-1, 1], labels [n] int64


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    return permutation(n, seed, epoch)


class DataSource:
    """Step k of the stream holds positions [k B, (k+1) B) of the concatenated epochs, each a keyed permutation.

    Fits `protocols.Source`: every epoch shows every sample once, a batch may span epochs, and any process can read any
    rows of any step.
    """

    def __init__(self, data: DataSet, batch_size: int, seed: int, *, labels: bool = True) -> None:
        self.data, self.batch_size, self.seed, self.labels = data, batch_size, seed, labels

    def batch(self, step: int, rows: Rows) -> Batch:
        """These rows of the step's global batch, on the CPU."""
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
