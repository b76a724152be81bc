"""Averages the gradients of all ranks while the backward pass still computes others.

torch's DistributedDataParallel is not used: it wraps a network that all losses call through it, while a recipe may call
its network several times for one loss, directly, under forward-mode derivatives, or as the frozen network of another.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from distill.training.world import World

SENT = 1 << 23  # most elements that are sent at once; a larger gradient is sent alone
Key = TypeVar("Key", int, str)


def buckets(sizes: Mapping[Key, int], most: int) -> Iterator[list[Key]]:
    """Split the keys, in order, into groups of at most `most` elements; a larger tensor is a group of its own."""
    group: list[Key] = []
    total = 0
    for key, size in sizes.items():
        if group and total + size > most:
            yield group
            group, total = [], 0
        group.append(key)
        total += size
    yield group


class Averaging:
    """Averages the gradients of `parameters` over the ranks in place, bucket by bucket, the last parameters first.

    Each gradient is a view into the tensor that is sent, so nothing is copied. Buckets are sent in the same order on
    all ranks, whatever the order in which gradients are computed, and whether or not a rank computes all of them.

    Call, for each optimizer step and on every rank: `begin` before the first backward pass, `expect` before the last
    one, `send_rest` after it, `wait` before the gradients are used. No other collective may start before `send_rest`
    returns. Free the gradients by setting them to None.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], world: World) -> None:
        self._world = world
        backwards = list(parameters)[::-1]
        sizes = {number: p.numel() for number, p in enumerate(backwards)}
        self._buckets = [[backwards[number] for number in group] for group in buckets(sizes, SENT)]
        self._flats: list[Tensor] = []
        self._works: list[distributed.Work] = []  # one for each bucket that was sent
        self._missing: list[int] = []  # number of gradients that each bucket waits for; empty: not the last pass
        for number, bucket in enumerate(self._buckets):
            for p in bucket:
                p.register_post_accumulate_grad_hook(partial(self._computed, number))

    def begin(self) -> None:
        """Set all gradients to zero."""
        self._flats = []
        for bucket in self._buckets:
            flat = torch.zeros(sum(p.numel() for p in bucket), dtype=bucket[0].dtype, device=bucket[0].device)
            self._flats.append(flat)
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = part.view_as(p)

    def expect(self) -> None:
        """The next backward pass is the last of this step: send each bucket as soon as its gradients are computed."""
        self._missing = [len(bucket) for bucket in self._buckets]

    def send_rest(self) -> None:
        """Send the buckets that lack gradients, because the loss does not depend on all parameters."""
        while len(self._works) < len(self._buckets):
            self._send()
        self._missing = []

    def wait(self) -> None:
        """Wait until all gradients are averaged. With GPUs, the device waits, not this process."""
        for work, flat in zip(self._works, self._flats, strict=True):
            work.wait()
            flat.div_(self._world.size)
        self._works = []
        self._flats = []

    def _computed(self, number: int, _: Tensor) -> None:
        if not self._missing:
            return
        self._missing[number] -= 1
        assert self._missing[number] >= 0, "a backward pass accumulated a gradient twice"
        while len(self._works) < len(self._buckets) and not self._missing[len(self._works)]:
            self._send()

    def _send(self) -> None:
        work = distributed.all_reduce(self._flats[len(self._works)], async_op=True)
        assert work is not None
        self._works.append(work)
