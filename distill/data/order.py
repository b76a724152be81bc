"""The order in which the items of a data set are read: every batch has items of one size."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distill.flow.draws import Rows, permutation


class BatchOrder:
    """The items of each batch of an endless stream of batches of size B.

    A bucket is the set of all items of one size. Bucket b, with n_b items, is a stream of epochs, each of which is a
    permutation of its items. Every B consecutive items of the stream are one batch, which may span two or more epochs.

    The batches of all buckets are ordered in epochs as well. The first e epochs contain the first floor(e n_b / B)
    batches of bucket b, so that each item appears as often as in e epochs, except for the items of a bucket that do
    not fill its next batch. Within an epoch, the buckets take turns in random order. With one bucket, batch k has the
    positions [k B, (k + 1) B) of its stream.

    The order depends only on the buckets, the batch size and the seed. Any batch can be asked for at any time; only the
    order of the current epoch is kept in memory.

    buckets: the items of each bucket, by index, [n_b] each. Raises ValueError if there are no items.
    """

    def __init__(self, buckets: Sequence[NDArray[np.int64]], batch_size: int, seed: int) -> None:
        self._buckets = [each for each in buckets if len(each)]
        if not self._buckets:
            raise ValueError("the order of a data set without items was asked for")
        self._batch_size, self._seed = batch_size, seed
        self._turns: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        """an epoch; the bucket of each of its batches; which batch of its bucket in this epoch that is"""
        self._shuffled: dict[int, tuple[int, NDArray[np.int64]]] = {}
        """by bucket: an epoch of its stream, and its items in their order"""

    def items(self, step: int, rows: Rows) -> list[tuple[int, list[int]]]:
        """The items in these rows of the batch of `step`: indices of items, with the epoch of the bucket's stream."""
        bucket, batch = self._find(step)
        n = len(self._buckets[bucket])
        position, stop = batch * self._batch_size + rows.start, batch * self._batch_size + rows.stop
        parts = []
        while position < stop:
            epoch, first = divmod(position, n)
            last = min(n, first + stop - position)
            parts.append((epoch, self._order(bucket, epoch)[first:last].tolist()))
            position += last - first
        return parts

    def _find(self, step: int) -> tuple[int, int]:
        """The bucket of the batch of `step`, and which batch of this bucket it is."""
        if len(self._buckets) == 1:
            return 0, step
        total, count, size = sum(map(len, self._buckets)), len(self._buckets), self._batch_size
        low, high = step * size // total, (step + 1 + count) * size // total + 1
        epoch = low + bisect_right(range(low, high + 1), step, key=lambda e: sum(self._before(e))) - 1
        before = self._before(epoch)
        if self._turns is None or self._turns[0] != epoch:
            counts = [after - begun for after, begun in zip(self._before(epoch + 1), before, strict=True)]
            order = permutation(sum(counts), self._seed, "turns of buckets", epoch).numpy()
            buckets = np.repeat(np.arange(count), counts)[order]
            batches = np.empty_like(buckets)
            batches[np.argsort(buckets, kind="stable")] = np.concatenate([np.arange(n) for n in counts])
            self._turns = epoch, buckets, batches
        turn = step - sum(before)
        bucket = int(self._turns[1][turn])
        return bucket, before[bucket] + int(self._turns[2][turn])

    def _before(self, epoch: int) -> list[int]:
        """How many batches of each bucket come before this epoch."""
        return [epoch * len(each) // self._batch_size for each in self._buckets]

    def _order(self, bucket: int, epoch: int) -> NDArray[np.int64]:
        """The items of a bucket in the order of one epoch of its stream."""
        kept = self._shuffled.get(bucket)
        if kept is None or kept[0] != epoch:
            items = self._buckets[bucket]
            own = () if len(self._buckets) == 1 else ("bucket", bucket)
            kept = epoch, items[permutation(len(items), self._seed, *own, epoch).numpy()]
            self._shuffled[bucket] = kept
        return kept[1]
