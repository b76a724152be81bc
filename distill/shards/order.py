"""The order in which the items of a set in shards are read."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from distill.flow import draws

GROUP = 4  # shards


class ShardOrder:
    """The items of a set in shards as a stream of epochs, each of which contains every item once.

    For an epoch the shards are shuffled and cut into groups of `group`, and the items are shuffled within each group.
    So reading the stream needs the files of one group at a time, and memory for the order of one group. Any part of any
    epoch can be asked for at any time.

    shards: the items of each shard. key: with the epoch, the seed of the order.
    """

    def __init__(self, shards: Sequence[range], *key: int | str, group: int = GROUP) -> None:
        self.shards, self.key, self.group = shards, key, group
        self._length = sum(map(len, shards))
        self._layout: tuple[int, list[list[int]], list[int]] = (-1, [], [])  # epoch, its groups, their first positions
        self._order: tuple[int, int, Tensor] = (-1, -1, torch.empty(0, dtype=torch.int64))  # epoch, group, its order

    def __len__(self) -> int:
        return self._length

    def take(self, epoch: int, first: int, last: int) -> Iterator[Tensor]:
        """The items at the positions first, ..., last - 1 of an epoch: [n] int64 from each group that has some."""
        while first < last:
            order, offset = self._find(epoch, first)
            chosen = order[offset : offset + last - first]
            first += len(chosen)
            yield chosen

    def _find(self, epoch: int, position: int) -> tuple[Tensor, int]:
        """The order of the group that contains a position of an epoch, and the place in it."""
        if self._layout[0] != epoch:
            shards = draws.permutation(len(self.shards), *self.key, epoch, "shards").tolist()
            groups = [shards[i : i + self.group] for i in range(0, len(shards), self.group)]
            sizes = (sum(len(self.shards[shard]) for shard in group) for group in groups)
            self._layout = epoch, groups, list(accumulate(sizes, initial=0))
        _, groups, starts = self._layout
        number = bisect_right(starts, position) - 1
        if self._order[:2] != (epoch, number):
            items = torch.cat(
                [torch.arange(each.start, each.stop) for each in map(self.shards.__getitem__, groups[number])]
            )
            self._order = epoch, number, items[draws.permutation(len(items), *self.key, epoch, number)]
        return self._order[2], position - starts[number]
