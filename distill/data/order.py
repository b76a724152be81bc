"""The order in which the items of a data set are read: every batch has items of one size."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Protocol, overload, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.flow import keyed_permutation
from distill.flow.draws import Rows, permutation
from distill.shards import ShardOrder
from distill.shards.order import GROUP

# Maximum number of items, of all buckets together, whose order is drawn as a whole: 8 bytes for each, in every process.
DRAWN = 2**24


@runtime_checkable
class ItemStream(Protocol):
    """The items of one size, as an endless stream of epochs, each of which contains every item once."""

    def __len__(self) -> int: ...
    def take(self, epoch: int, first: int, last: int) -> Iterator[Tensor]: ...  # items at these positions, [n] int64


class Shuffled:
    """A stream of epochs, each of which is a permutation of the items. Implements `ItemStream`.

    The order of an epoch of up to `drawn` items is drawn as a whole and kept in memory. That of more items is computed
    position by position (see `keyed_permutation`).

    items: their indices, [n]. key: with the epoch, the seed of the permutation.
    """

    def __init__(self, items: NDArray[np.int64] | range, *key: int | str, drawn: int = DRAWN) -> None:
        self._items, self._key, self._drawn = items, key, drawn
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))  # of one epoch

    def __len__(self) -> int:
        return len(self._items)

    def take(self, epoch: int, first: int, last: int) -> Iterator[Tensor]:
        if len(self) > self._drawn:
            places = keyed_permutation.at(np.arange(first, last), len(self), *self._key, epoch)
        else:
            if self._order[0] != epoch:
                self._order = epoch, permutation(len(self), *self._key, epoch).numpy()
            places = self._order[1][first:last]
        items = self._items
        yield torch.from_numpy(items[places] if isinstance(items, np.ndarray) else places + items.start)


def streams(
    count: int,
    buckets: Sequence[NDArray[np.int64] | range] | None,
    shards: Sequence[Sequence[range]] | None,
    seed: int,
    *,
    group: int = GROUP,
    drawn: int = DRAWN,
) -> list[ItemStream]:
    """The stream of each bucket of a data set of `count` items.

    buckets: the items of each, as in `DataSet.buckets`. shards, group: see `ShardedData`. drawn: see `Shuffled`; if all
    buckets together have more items, each of their orders is computed position by position.
    """
    if shards is not None:
        return [ShardOrder(each, seed, "data", bucket, group=group) for bucket, each in enumerate(shards)]
    if buckets is None:
        return [Shuffled(range(count), seed, drawn=drawn)]
    drawn = drawn if sum(map(len, buckets)) <= drawn else 0
    if sum(len(each) > 0 for each in buckets) == 1:
        return [Shuffled(each, seed, drawn=drawn) for each in buckets]
    return [Shuffled(each, seed, "bucket", bucket, drawn=drawn) for bucket, each in enumerate(buckets)]


class BatchOrder:
    """The items of each batch of an endless stream of batches of size B.

    A bucket is the set of all items of one size. Bucket b, with n_b items, is a stream of epochs (`ItemStream`). Every
    B consecutive items of the stream are one batch, which may span two or more epochs.

    The batches of all buckets are ordered in epochs as well. The first e epochs contain the first floor(e n_b / B)
    batches of bucket b, so that each item appears as often as in e epochs, except for the items of a bucket that do
    not fill its next batch. Within an epoch, the buckets take turns in random order. With one bucket, batch k has the
    positions [k B, (k + 1) B) of its stream.

    The order depends only on the streams, the batch size and the seed. Any batch can be asked for at any time; only the
    order of the current epoch is kept in memory.

    streams: of each bucket. Raises ValueError if there are no items.
    """

    def __init__(self, streams: Sequence[ItemStream], batch_size: int, seed: int) -> None:
        self._numbers = [number for number, each in enumerate(streams) if len(each)]
        self._streams = [streams[number] for number in self._numbers]
        if not self._streams:
            raise ValueError("the order of a data set without items was asked for")
        self._batch_size, self._seed = batch_size, seed
        self._turns: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        """an epoch, and what `_in_epoch` returns for it"""

    def items(self, step: int, rows: Rows) -> list[tuple[int, list[int]]]:
        """The items in these rows of the batch of `step`: indices of items, with the epoch of the bucket's stream."""
        bucket, batch = self._find(step)
        stream = self._streams[bucket]
        n = len(stream)
        position, stop = batch * self._batch_size + rows.start, batch * self._batch_size + rows.stop
        parts = []
        while position < stop:
            epoch, first = divmod(position, n)
            last = min(n, first + stop - position)
            parts.append((epoch, [item for some in stream.take(epoch, first, last) for item in some.tolist()]))
            position += last - first
        return parts

    def first_step(self, number: int) -> int:
        """The step of the first batch of a bucket, which must have items. number: its position in `streams`."""
        bucket = self._numbers.index(number)
        if len(self._streams) == 1:
            return 0
        epoch = -(-self._batch_size // len(self._streams[bucket])) - 1  # the first at whose end there is a whole batch
        buckets, _ = self._in_epoch(epoch)
        return sum(self._before(epoch)) + int(np.argmax(buckets == bucket))

    def _find(self, step: int) -> tuple[int, int]:
        """The bucket of the batch of `step`, and which batch of this bucket it is."""
        if len(self._streams) == 1:
            return 0, step
        total, count, size = sum(map(len, self._streams)), len(self._streams), self._batch_size
        low, high = step * size // total, (step + 1 + count) * size // total + 1
        epoch = low + bisect_right(range(low, high + 1), step, key=lambda e: sum(self._before(e))) - 1
        before, (buckets, batches) = self._before(epoch), self._in_epoch(epoch)
        turn = step - sum(before)
        bucket = int(buckets[turn])
        return bucket, before[bucket] + int(batches[turn])

    def _in_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The bucket of each batch of an epoch, and which batch of its bucket in this epoch that is."""
        if self._turns is None or self._turns[0] != epoch:
            counts = [b - a for a, b in zip(self._before(epoch), self._before(epoch + 1), strict=True)]
            order = permutation(sum(counts), self._seed, "turns of buckets", epoch).numpy()
            buckets = np.repeat(np.arange(len(counts)), counts)[order]
            batches = np.empty_like(buckets)
            batches[np.argsort(buckets, kind="stable")] = np.concatenate([np.arange(n) for n in counts])
            self._turns = epoch, buckets, batches
        return self._turns[1:]

    def _before(self, epoch: int) -> list[int]:
        """How many batches of each bucket come before this epoch."""
        return [epoch * len(each) // self._batch_size for each in self._streams]


class Ranges(Sequence[range]):
    """The items of each shard, as two arrays would describe them.

    stops: [S] where the items of each shard end, rising. last: the number of items; later shards have none.
    """

    def __init__(self, stops: NDArray[np.int64], last: int) -> None:
        self._stops = np.minimum(stops[: int(np.searchsorted(stops, last)) + 1], last)

    def __len__(self) -> int:
        return len(self._stops)

    @overload
    def __getitem__(self, index: int) -> range: ...
    @overload
    def __getitem__(self, index: slice) -> list[range]: ...
    def __getitem__(self, index: int | slice) -> range | list[range]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # raises IndexError
        return range(int(self._stops[number - 1]) if number else 0, int(self._stops[number]))
