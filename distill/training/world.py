"""The processes (ranks) that train together: the rows of each, and the collectives of the training loop.

A rank raises `PeerLost` if it has waited too long for another rank, or if that rank has ended. The message says
where in the loop it was: step and turn.
"""

import faulthandler
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from math import inf
from typing import Self, TypeVar

import torch
from torch import Tensor, distributed

from distill.core.errors import EXIT_PEER, PeerLost, RunError
from distill.flow.draws import Rows
from distill.launch import gpus

T = TypeVar("T")
PLACE = 120  # bytes of the place that ranks exchange in `meet`
FLAGS = 8  # most flags that they exchange there
GRACE = 3.0  # seconds by which a watch waits longer than the timeout of a collective, which raises an exception
PATIENCE = 6  # in timeouts of a collective: how long the ranks wait for rank 0's own work, such as saving
POLL = 0.02  # seconds
LOST = re.compile(r"gloo|[Tt]imed out|[Tt]imeout|remote process exited|[Cc]onnection|Broken pipe")
Lost = Callable[[str], None]


class Watch:
    """Ends this process if it stays too long in one place of the loop.

    The process may hang, or wait for a GPU, which the timeout of a collective cannot end. Before the end, the place and
    the stacks of all threads are written to stderr.

    seconds: the limit. lost: called with a message before the process ends.
    """

    def __init__(self, rank: int, seconds: float, lost: Lost) -> None:
        self._rank, self._seconds, self._lost = rank, seconds, lost
        self._place, self._deadline = "", inf
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def arm(self, place: str) -> None:
        self._place, self._deadline = place, time.monotonic() + self._seconds

    def disarm(self) -> None:
        self._deadline = inf

    def _look(self) -> None:
        while time.monotonic() < self._deadline:
            time.sleep(min(1.0, self._seconds / 4))
        message = f"rank {self._rank} has made no progress for {self._seconds:.0f} s at: {self._place}"
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        self._lost(message)
        advice = "if this is expected, increase launch.collective_minutes"
        os.write(2, f"{message}; its stack is printed above; {advice}\n".encode())
        os._exit(EXIT_PEER)


@dataclass(frozen=True)
class World:
    """One of `size` ranks that run the same program on different rows. With one rank, collectives do nothing."""

    rank: int = 0
    size: int = 1
    watch: Watch | None = None
    store: distributed.Store | None = None
    timeout: timedelta = timedelta(minutes=10)
    """of a collective"""
    works: Iterator[int] = field(default_factory=count)  # numbers what all ranks do together, equally on all

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes files for all."""
        return self.rank == 0

    def rows(self, batch_size: int, micro_batch: int) -> list[Rows]:
        """The rows of this rank's micro-batches. Rank r has the r-th contiguous part of the global batch."""
        share = batch_size // self.size
        assert share * self.size == batch_size and share % micro_batch == 0
        begin = self.rank * share
        return [Rows(start, start + micro_batch, batch_size) for start in range(begin, begin + share, micro_batch)]

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over the ranks; all ranks must give the same shape."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        distributed.all_reduce(total)
        return total.div_(self.size)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast these tensors from rank 0, in place."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), 0)

    def meet(self, place: str, *flags: bool) -> list[bool]:
        """Wait for all ranks. Returns for each flag whether it is set on any rank.

        RunError unless all ranks are at the same `place` of the program.
        """
        if self.size == 1:
            return list(flags)
        said = bytes(flags).ljust(FLAGS, b"\0") + place.encode()[:PLACE].ljust(PLACE)
        ours = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        heard = [torch.empty_like(ours) for _ in range(self.size)]
        with self.contact(place):
            distributed.all_gather(heard, ours)
        texts = [bytes(other.tolist()) for other in heard]
        places = [text[FLAGS:].decode(errors="replace").strip() for text in texts]
        if len(set(places)) > 1:
            where = "; ".join(f"rank {rank} is at {there}" for rank, there in enumerate(places))
            raise RunError(
                f"the ranks are at different places of the program: {where}; a recipe must yield the same turns on "
                "every rank"
            )
        return [any(text[i] for text in texts) for i in range(len(flags))]

    def alone(self, what: str, work: Callable[[], T]) -> T | None:
        """Rank 0 runs `work` and returns its result. The other ranks wait and return None.

        They wait up to `PATIENCE` times the timeout of a collective. If `work` raises an exception, rank 0 ends, and
        the other ranks raise `PeerLost`.
        """
        self.meet(what)
        if self.size == 1:
            return work()
        assert self.store is not None
        key = f"{what}, {next(self.works)}"
        if self.first:
            found = work()
            self.store.set(key, b"done")
            self.meet(f"after {what}")  # the store ends with this process, so wait until all have read it
            return found
        deadline = time.monotonic() + PATIENCE * self.timeout.total_seconds()
        with self.contact(f"waiting for rank 0: {what}", watched=False):
            while not self.store.check([key]):
                if time.monotonic() > deadline:
                    raise PeerLost(f"rank {self.rank} has waited too long for rank 0: {what}")
                time.sleep(POLL)
        self.meet(f"after {what}")
        return None

    def tell(self, what: str, text: str) -> list[str]:
        """The texts that all ranks give, in the order of the ranks. Waits as long as for `alone`. All must call it."""
        if self.size == 1:
            return [text]
        assert self.store is not None
        name = f"{what}, {next(self.works)}"
        keys = [f"{name}, rank {rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], text.encode())
        deadline = time.monotonic() + PATIENCE * self.timeout.total_seconds()
        with self.contact(f"waiting for the other ranks: {what}", watched=False):
            while not self.store.check(keys):
                if time.monotonic() > deadline:
                    raise PeerLost(f"rank {self.rank} has waited too long for the other ranks: {what}")
                time.sleep(POLL)
            return [each.decode() for each in self.store.multi_get(keys)]

    def gather(self, place: str, item: T) -> list[T]:
        """The items that all ranks give, in the order of the ranks, on rank 0; an empty list on the others.

        An item is what one process of the run sends to another, pickled by torch and never kept in a file; its tensors
        are on the CPU. All ranks must call it.
        """
        if self.size == 1:
            return [item]
        found: list[T] | None = [item] * self.size if self.first else None
        with self.contact(place):
            distributed.gather_object(item, found, 0)
        return found or []

    def wait(self, what: str, look: Callable[[], None]) -> None:
        """Wait until all ranks have called this, however long their own work before takes. All ranks must call it.

        look: called again and again while this rank waits; it may raise an exception, as for a signal.
        """
        if self.size == 1:
            return
        assert self.store is not None
        keys = [f"{what} {rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], b"done")
        with self.contact(f"waiting for the other ranks: {what}", watched=False):
            while not self.store.check(keys):
                look()
                time.sleep(POLL)
        self.meet(f"after {what}")

    @contextmanager
    def contact(self, place: str, *, watched: bool = True) -> Iterator[None]:
        """A context for code that may wait for other ranks. Raises PeerLost, with `place`, if one cannot be reached.

        watched: whether the watch may end the process there.
        """
        if self.watch is not None and watched:
            self.watch.arm(place)
        try:
            yield
        except RunError:
            raise  # one of ours, even if its text matches LOST
        except RuntimeError as error:
            if not LOST.search(str(error)):
                raise
            reason = str(error).strip().splitlines()[0][:160]
            raise PeerLost(
                f"rank {self.rank}, {place}: lost contact with another rank, which has exited or hangs ({reason})"
            ) from error
        finally:
            if self.watch is not None:
                self.watch.disarm()

    @classmethod
    def join(cls, device: torch.device, timeout_minutes: float, local_rank: int, lost: Lost) -> Self:
        """Join the other ranks, as the environment says (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

        device: the kind of device on which all ranks compute; with GPUs, this rank uses that of `gpus.own`.
        timeout_minutes: of a collective.
        lost: called with a message if the process must end without an exception.
        """
        backend, own, timeout = "gloo", None, timedelta(minutes=timeout_minutes)
        if device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"  # messages go by gloo, which need not wait for a GPU
            own = gpus.own(local_rank)
            torch.cuda.set_device(own)
        with cls(local_rank).contact("joining the other ranks"):
            store, rank, size = next(distributed.rendezvous("env://", timeout=timeout))
            works = distributed.PrefixStore("works", store)
            if own is not None:
                gpus.refuse_shared(works, rank, size, own)
            distributed.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=own
            )  # with a device, NCCL connects here, and not in the first collective
        watch = Watch(rank, timeout.total_seconds() + GRACE, lost)
        return cls(rank, size, watch, works, timeout)


ALONE = World()
