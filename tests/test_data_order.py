"""The order in which the items of a data set are read: one size per batch, every item equally often, any position."""

import tracemalloc
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch

from distill.data import DataSource
from distill.data.order import BatchOrder, Shuffled, streams
from distill.data.source import Bucket, Items
from distill.flow import keyed_permutation
from distill.flow.draws import Rows, permutation

BUCKETS = [[40, 3, 17, 0], [1], [2, 9, 8, 7, 6, 5, 4], [], list(range(10, 17)), list(range(18, 40))]
COUNT, SIZE = 41, 4


def order(size: int = SIZE, seed: int = 3, buckets=BUCKETS) -> BatchOrder:
    return BatchOrder(streams(0, [np.array(each, np.int64) for each in buckets], None, seed), size, seed)


def batch(of: BatchOrder, step: int, size: int = SIZE) -> list[int]:
    return [item for _, items in of.items(step, Rows(0, size, size)) for item in items]


def bucket_of(items: list[int]) -> int:
    (found,) = [number for number, bucket in enumerate(BUCKETS) if set(items) <= set(bucket)]
    return found


@pytest.mark.parametrize("size", [1, 4, 9, 64])
def test_in_whole_epochs_every_item_appears_equally_often_but_for_batches_that_are_not_full(size):
    asked = order(size)
    ends = [sum(epochs * len(bucket) // size for bucket in BUCKETS) for epochs in range(1, 2 * size + 1)]
    counts, step = np.zeros(COUNT, np.int64), 0
    for epochs, end in enumerate(ends, 1):
        while step < end:
            np.add.at(counts, batch(asked, step, size), 1)
            step += 1
        for bucket in filter(None, BUCKETS):
            given = epochs * len(bucket) // size * size  # samples of the bucket so far
            low, extra = divmod(given, len(bucket))
            assert sorted(counts[bucket].tolist()) == [low] * (len(bucket) - extra) + [low + 1] * extra
            assert epochs - size / len(bucket) < low + (extra > 0) <= epochs
    assert counts.tolist() == [2 * size] * COUNT  # `size` epochs fill whole batches


def test_a_batch_is_of_one_bucket_and_the_buckets_take_turns_in_an_order_of_each_epoch():
    asked = order()
    steps = [bucket_of(batch(asked, step)) for step in range(4 * COUNT)]
    found = [steps[i : i + COUNT] for i in range(0, len(steps), COUNT)]  # four epochs each, of 41 batches
    assert all(each.count(number) == len(bucket) for each in found for number, bucket in enumerate(BUCKETS))
    assert len({tuple(each) for each in found}) == len(found)
    assert steps != [bucket_of(batch(order(seed=4), step)) for step in range(4 * COUNT)]


def test_the_epoch_of_an_item_counts_how_often_its_bucket_has_been_read():
    asked, seen = order(), dict.fromkeys(range(COUNT), 0)
    for step in range(5 * COUNT):
        for epoch, items in asked.items(step, Rows(0, SIZE, SIZE)):
            for item in items:
                assert epoch == seen[item]
                seen[item] += 1


def test_a_step_is_the_same_asked_directly_or_after_others_and_in_any_rows():
    asked = order()
    stream = [batch(asked, step) for step in range(200)]
    assert stream[::-1] == [batch(asked, step) for step in reversed(range(200))]
    for step in (0, 41, 63, 199):
        assert batch(order(), step) == stream[step]
        for cuts in ([1, 3], [4], [2, 1, 1], [1, 1, 1, 1]):
            ends = list(accumulate(cuts, initial=0))
            parts = [order().items(step, Rows(a, b, SIZE)) for a, b in pairwise(ends)]
            assert [item for part in parts for _, items in part for item in items] == stream[step]


def test_one_bucket_is_read_in_permutations_of_its_items_without_a_gap():
    items = [list(range(7, 17)), [], []]
    stream = [item for step in range(10) for item in batch(order(buckets=items), step)]
    expected = [7 + position for epoch in range(4) for position in permutation(10, 3, epoch).tolist()]
    assert stream == expected


def test_the_order_of_many_items_is_computed_position_by_position():
    """Every epoch has each item once, in another order; a range, and any other items; in any rows, and far away."""
    for items in (range(5, 305), np.arange(300) * 7):
        many = Shuffled(items, 3, "many", drawn=299)
        epochs = [next(many.take(epoch, 0, 300)) for epoch in (0, 1, 10**18)]
        assert [sorted(each.tolist()) for each in epochs] == [list(items)] * 3
        assert len({tuple(each.tolist()) for each in epochs}) == 3
        assert torch.equal(next(many.take(1, 17, 40)), epochs[1][17:40])
        assert torch.equal(next(Shuffled(items, 3, "many", drawn=300).take(0, 0, 300)), torch.from_numpy(
            np.array(items)[permutation(300, 3, "many", 0).numpy()]
        ))  # fmt: skip


def test_the_items_of_all_buckets_decide_whether_an_order_is_drawn():
    """Otherwise, a process would keep the orders of all items of many buckets, each of which is small enough."""
    buckets, total = [range(300), range(0), range(300, 500), range(500, 501)], 501
    drawn, computed = (streams(0, buckets, None, 3, drawn=most) for most in (total, total - 1))
    for number, items in enumerate(buckets):
        if not items:
            continue
        orders = [next(each[number].take(2, 0, len(items))) - items.start for each in (drawn, computed)]
        assert torch.equal(orders[0], permutation(len(items), 3, "bucket", number, 2))
        places = keyed_permutation.at(np.arange(len(items)), len(items), 3, "bucket", number, 2)
        assert orders[1].tolist() == places.tolist()
    assert all(len(each._order[1]) == 0 for each in computed)
    (alone, _) = streams(0, [range(300), range(0)], None, 3, drawn=300)
    assert torch.equal(next(alone.take(2, 0, 300)), permutation(300, 3, 2))


def test_the_order_of_a_hundred_million_items_takes_no_memory_for_each():
    tracemalloc.start()
    try:
        asked = BatchOrder(streams(10**8, None, None, 3), 256, 3)
        found = [item for step in (0, 390_624, 390_625, 10**12) for item in batch(asked, step, 256)]
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
    assert len(set(found)) > 1000 and min(found) >= 0 and max(found) < 10**8


def test_far_positions_are_exact():
    """Beyond the whole numbers of float64, epochs of four batches' worth of items still hold each item four times."""
    asked, begin = order(), 10**18 * COUNT
    stream = [batch(asked, step) for step in range(begin, begin + COUNT)]
    assert np.bincount(sum(stream, [])).tolist() == [SIZE] * COUNT
    (first, _), *_ = asked.items(begin, Rows(0, 1, SIZE))
    assert first == 10**18 * SIZE


def test_an_order_without_items_is_refused():
    with pytest.raises(ValueError, match="the order of a data set without items was asked for"):
        order(buckets=[[], []])


class Sided:
    """Item i is filled with i; its height is that of its bucket. Implements `data.DataSet`."""

    name, shape, num_classes, prompts, digest, encoded = "sided", (1, 4, 4), COUNT, None, "0" * 64, False
    buckets = [Bucket((1, 2 + i, 4), np.array(each, np.int64)) for i, each in enumerate(BUCKETS)]

    def __len__(self) -> int:
        return COUNT

    def items(self, epoch, indices):
        height = 2 + bucket_of(list(indices))
        samples = torch.tensor(indices, dtype=torch.float32)[:, None, None, None].expand(-1, 1, height, 4)
        return Items(samples, torch.tensor(indices), torch.full((len(indices), 6), height))


def test_the_batches_of_a_source_have_one_shape_with_labels_and_sizes_in_their_rows():
    source, heights = DataSource(Sided(), SIZE, 3, sizes=True), set()
    for step in range(COUNT):
        found = source.batch(step, Rows(0, SIZE, SIZE))
        items = batch(order(), step)
        height = 2 + bucket_of(items)
        heights.add(height)
        assert found.data.shape == (SIZE, 1, height, 4) and found.data[:, 0, 0, 0].tolist() == items
        assert found.cond["class_labels"].tolist() == items
        assert found.cond["sizes"].tolist() == [[height] * 6] * SIZE
        assert torch.equal(source.batch(step, Rows(1, 3, SIZE)).data, found.data[1:3])
    assert heights == {2, 3, 4, 6, 7}


def test_the_largest_batch_is_the_first_of_the_bucket_of_the_largest_samples():
    source = DataSource(Sided(), SIZE, 3)
    heights = [source.batch(step, Rows(0, SIZE, SIZE)).data.shape[2] for step in range(40)]
    assert source.largest_step == heights.index(7)
    for number, bucket in enumerate(BUCKETS):
        if bucket:
            found = order().first_step(number)
            assert [bucket_of(batch(order(), step)) == number for step in range(found + 1)] == [False] * found + [True]
