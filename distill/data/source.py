"""An endless stream of batches of real data, which any number of processes can read."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.data.order import BatchOrder, streams
from distill.data.prompts import Prompts
from distill.flow.draws import Rows
from distill.protocols import Batch


class Items(NamedTuple):
    """Some samples of a data set."""

    samples: Tensor  # [n, ...] float32: pixels in [-1, 1], or latents
    labels: Tensor | None = None  # [n] int64: class ids, or numbers of prompts; None: unconditional
    sizes: Tensor | None = None  # [n, 6] int64, see `protocols.Conditioning`


class Bucket(NamedTuple):
    """All items of one size."""

    shape: tuple[int, ...]  # of one sample
    items: NDArray[np.int64] | range  # [n], their indices; may be empty


@runtime_checkable
class DataSet(Protocol):
    """Samples with labels. A sample depends only on (epoch, index)."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...  # of one sample; with buckets, of those in the bucket of data.size
    @property
    def buckets(self) -> Sequence[Bucket] | None: ...  # None: all samples have `shape`
    @property
    def num_classes(self) -> int | None: ...  # or the number of prompts; None: unconditional
    @property
    def prompts(self) -> Prompts | None: ...  # label i is prompts[i]; None: labels are classes, or there are none
    @property
    def digest(self) -> str: ...  # SHA-256 over samples, labels, prompts and the options that change them
    @property
    def encoded(self) -> bool: ...  # whether samples are latents already, which the codec must not encode
    def __len__(self) -> int: ...
    def items(self, epoch: int, indices: Sequence[int]) -> Items: ...


@runtime_checkable
class ShardedData(Protocol):
    """A data set that is stored in shards, which are read one group after the other."""

    @property
    def shards(self) -> Sequence[Sequence[range]]: ...  # the items of each shard, for each bucket
    @property
    def group(self) -> int: ...  # how many shards are shuffled together, see `shards.ShardOrder`


@runtime_checkable
class Skipping(Protocol):
    """A data set that skips items which turn out to be unreadable when they are used, and warns about them.

    Worker processes have copies of it, which do not warn. What a copy has found is passed to `skip` of the original.
    """

    @property
    def skipped(self) -> Sequence[int]: ...  # rows that were found since the data set was loaded, in this order
    def skip(self, rows: Sequence[int]) -> None: ...  # warns about new ones; InputError if there are too many


@runtime_checkable
class NamesSkipped(Protocol):
    """A data set that can name the items that it skips."""

    def unusable(self, most: int) -> tuple[int, list[str]]: ...  # how many; the first, at most `most`, and why if known


@runtime_checkable
class Labelled(Protocol):
    """A data set that can be searched for a label."""

    def with_label(self, label: int) -> int | None: ...  # the first item that has it; None: there is none


@runtime_checkable
class Drawable(Protocol):
    """A data set of a known law, of which other samples can be drawn, to compare generated ones with.

    They are points in the plane.
    """

    def draw(self, seed: int, count: int) -> Tensor: ...  # [count, 2]


class DataSource:
    """A stream of batches of size B, each with items of one size. Implements `protocols.Source`.

    `order.BatchOrder` defines the order of the items. Any process can read any rows of any step.

    labels, sizes: whether the condition of a batch has the labels and the sizes of its samples, if the data has them.
    """

    def __init__(self, data: DataSet, batch_size: int, seed: int, *, labels: bool = True, sizes: bool = False) -> None:
        self.data, self.batch_size, self.seed, self.labels, self.sizes = data, batch_size, seed, labels, sizes
        buckets = None if data.buckets is None else [each.items for each in data.buckets]
        shards, group = (data.shards, data.group) if isinstance(data, ShardedData) else (None, 1)
        self._order = BatchOrder(streams(len(data), buckets, shards, seed, group=group), batch_size, seed)

    @property
    def largest_step(self) -> int:
        """A step whose batch needs the most memory: its samples are of the largest size."""
        sizes = [math.prod(each.shape) if len(each.items) else 0 for each in self.data.buckets or []]
        return self._order.first_step(sizes.index(max(sizes))) if sizes else 0

    def batch(self, step: int, rows: Rows) -> Batch:
        """Returns these rows of the global batch of `step`, on the CPU."""
        if rows.total != self.batch_size:
            raise ValueError(
                f"rows of a batch of {rows.total} were asked from a source of batches of {self.batch_size}"
            )
        parts = [self.data.items(epoch, indices) for epoch, indices in self._order.items(step, rows)]
        found = {
            "class_labels": [each.labels for each in parts if self.labels],
            "sizes": [each.sizes for each in parts if self.sizes],
        }
        cond = {name: torch.cat(known) for name, each in found.items() if (known := [t for t in each if t is not None])}
        samples = [each.samples for each in parts]
        return Batch(samples[0] if len(samples) == 1 else torch.cat(samples), None, cond)
