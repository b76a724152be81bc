"""Random numbers without generator state.

Random numbers for training are a function of (seed, step, turn, name, row of the global batch), those for sampling of
(seed, index). A run is therefore reproducible from its seed and step, with any number of processes.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.core.errors import InputError
from distill.flow import philox

SLACK = 1e-9  # added before rounding down, because e.g. 0.29 * 100 < 29 in floating point


def key(*parts: int | str) -> int:
    """Returns a 63-bit hash of all parts, to seed a generator that is used once."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Returns a CPU generator seeded by `key(*parts)`, so that its numbers are the same for every device."""
    return torch.Generator("cpu").manual_seed(key(*parts))


@dataclass(frozen=True)
class Rows:
    """The rows [start, stop) of a global batch of `total` rows that a micro-batch holds."""

    start: int
    stop: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.total:
            raise ValueError(f"rows [{self.start}, {self.stop}) are not within a global batch of {self.total}")


class Split(NamedTuple):
    """The rows of a micro-batch in two parts.

    mask: [B] bool, the rows of the first part. rows, others: [n >= 1] indices of the rows of each part; row 0 if a part
    is empty, since networks cannot take an empty batch, and under ZeRO-3 every rank must make the call: the result must
    then be ignored.
    """

    mask: Tensor
    rows: Tensor
    others: Tensor


@dataclass(frozen=True)
class StepDraw:
    """Random numbers for one turn of one step. Implements `protocols.Draw`.

    Each row of the global batch has its own stream (see `philox`). Only the numbers of `rows` are computed, on the
    device of `like`, and they equal those that a single process would draw for these rows.
    """

    seed: int
    step: int
    turn: int
    rows: Rows

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal numbers in the shape, dtype and device of `like` [B, ...], computed in float32."""
        numbers = philox.normal(self._key("normal", name), self._own(name, like), like[0].numel(), like.device)
        return numbers.view(like.shape).to(like.dtype)

    def uniform(self, name: str, like: Tensor) -> Tensor:
        """Uniform numbers on [0, 1), [B], on the device of `like` [B, ...]; always float32, because times need it."""
        return philox.uniform(self._key("uniform", name), self._own(name, like), 1, like.device).squeeze(1)

    def integer(self, name: str, below: int) -> int:
        """An integer in 0 ... below - 1, the same for all ranks and micro-batches of the turn."""
        return self._key("integer", name) % below

    def split(self, fraction: float, like: Tensor) -> Split:
        """Selects `fraction` of the rows of the global batch, rounded down and evenly spaced.

        The choice of rows is not random, but the samples in them are. The tensors are on the device of `like` [B, ...],
        which is not waited for. Raises InputError if a fraction between 0 and 1 selects no row or all rows.
        """
        own, total = self._own("split", like), self.rows.total
        if 0 < fraction < 1 and math.floor(total * fraction + SLACK) in (0, total):
            raise InputError(
                f"a fraction of {fraction:g} selects none or all of the {total} samples of a batch; increase batch_size"
            )
        counts = np.floor(np.arange(own.start, own.stop + 1) * fraction + SLACK)
        mask = counts[1:] > counts[:-1]
        indices = (np.flatnonzero(each) for each in (mask, ~mask))
        arrays = (mask, *(each if len(each) else np.zeros(1, np.int64) for each in indices))
        return Split(*(torch.from_numpy(each).to(like.device, non_blocking=True) for each in arrays))

    def _own(self, name: str, like: Tensor) -> range:
        """The range of rows of the global batch in this micro-batch. Raises ValueError if `like` has another length."""
        if like.shape[0] != self.rows.stop - self.rows.start:
            raise ValueError(f"draw '{name}': {like.shape[0]} rows given, this micro-batch has {self.rows}")
        return range(self.rows.start, self.rows.stop)

    def _key(self, kind: str, name: str) -> int:
        return key(self.seed, self.step, self.turn, kind, name)


def sample_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise for the samples `indices`, [len(indices), *shape] float32 on the CPU.

    Each row depends only on (seed, index): Philox 4x64 keyed by the seed, with the index in the counter's highest word.
    Pairs, sampling and evaluation all use this function.
    """
    out = np.empty((len(indices), *shape), dtype=np.float32)
    bits = np.random.Philox(key=seed, counter=0)
    stream, state = np.random.Generator(bits), bits.state
    for row, index in enumerate(indices):
        state["state"]["counter"][3] = index
        bits.state = state  # five times as fast as a new generator, with the same numbers
        stream.standard_normal(dtype=np.float32, out=out[row, ...])
    return torch.from_numpy(out)


def sample_labels(indices: Sequence[int], num_classes: int) -> Tensor:
    """Class ids of samples, index mod num_classes, [len(indices)] int64. Consecutive indices have balanced classes."""
    return torch.tensor([i % num_classes for i in indices], dtype=torch.int64)


def permutation(n: int, *parts: int | str) -> Tensor:
    """A random permutation of range(n), [n] int64, seeded by `parts`; used as the order of an epoch."""
    return torch.randperm(n, generator=generator("order", *parts))


def uniforms(count: int, *parts: int | str) -> list[float]:
    """`count` uniform numbers on [0, 1), seeded by `parts`; used to crop and flip a sample."""
    return torch.rand(count, generator=generator("uniforms", *parts)).tolist()
