"""All randomness. Training draws are keyed by (seed, step, turn, name, row of the global batch), sample draws by (seed,
index): neither has a state to lose, so (seed, step) is the whole of it, and any number of processes sees the same
numbers.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.core.errors import InputError
from distill.flow import philox

SLACK = 1e-9  # 0.29 x 100 is below 29 in floating point


def key(*parts: int | str) -> int:
    """63 bits that depend on all parts: the seed of a generator that is used once."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator keyed by parts: its numbers do not depend on the device that uses them."""
    return torch.Generator("cpu").manual_seed(key(*parts))


@dataclass(frozen=True)
class Rows:
    """This micro-batch's rows [start, stop) of a global batch of `total`."""

    start: int
    stop: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.total:
            raise ValueError(f"rows [{self.start}, {self.stop}) are not within a global batch of {self.total}")


@dataclass(frozen=True)
class StepDraw:
    """Draws of one turn of one step. Fits `protocols.Draw`.

    Row i of the global batch has numbers of its own (`philox`), so only `rows` are drawn, on the device of `like`, and
    they are those that one process would draw for the whole batch.
    """

    seed: int
    step: int
    turn: int
    rows: Rows

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal in the shape, dtype and on the device of `like` [B, ...]; drawn in float32."""
        numbers = philox.normal(self._key("normal", name), self._own(name, like), like[0].numel(), like.device)
        return numbers.view(like.shape).to(like.dtype)

    def uniform(self, name: str, like: Tensor) -> Tensor:
        """Uniform on [0, 1), [B], float32 whatever the dtype of `like` [B, ...] (times are never bf16)."""
        return philox.uniform(self._key("uniform", name), self._own(name, like), 1, like.device).squeeze(1)

    def integer(self, name: str, below: int) -> int:
        """One number in 0 ... below - 1, the same for all ranks and micro-batches of the turn."""
        return self._key("integer", name) % below

    def every(self, fraction: float, like: Tensor) -> Tensor:
        """[B] bool on the device of `like`: `fraction` of the rows of the global batch, rounded down, spread evenly.

        Which rows they are is not random: what they hold is.
        """
        own, total = self._own("every", like), self.rows.total
        if 0 < fraction < 1 and math.floor(total * fraction + SLACK) in (0, total):
            raise InputError(
                f"{fraction:g} of a batch of {total} samples is no whole sample (or all of them); raise batch_size"
            )
        before = torch.arange(own.start, own.stop + 1, dtype=torch.float64, device=like.device)
        counts = (before * fraction + SLACK).floor()
        return counts[1:] > counts[:-1]

    def _own(self, name: str, like: Tensor) -> range:
        """The rows of the global batch that `like` holds."""
        if like.shape[0] != self.rows.stop - self.rows.start:
            raise ValueError(f"draw '{name}': {like.shape[0]} rows given, this micro-batch has {self.rows}")
        return range(self.rows.start, self.rows.stop)

    def _key(self, kind: str, name: str) -> int:
        return key(self.seed, self.step, self.turn, kind, name)


def sample_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of samples `indices`, [len(indices), *shape] float32 on the CPU.

    Row i depends on (seed, index) alone: Philox 4x64 keyed by the seed, with the index in the counter's highest word.
    The one function for pairs, sampling and evaluation.
    """
    out = np.empty((len(indices), *shape), dtype=np.float32)
    bits = np.random.Philox(key=seed, counter=0)
    stream, state = np.random.Generator(bits), bits.state
    for row, index in enumerate(indices):
        state["state"]["counter"][3] = index
        bits.state = state  # a fifth of the time of a new generator, the same numbers
        stream.standard_normal(dtype=np.float32, out=out[row, ...])
    return torch.from_numpy(out)


def sample_labels(indices: Sequence[int], num_classes: int) -> Tensor:
    """Class of each sample [len(indices)] int64: index mod num_classes, so that any consecutive range is balanced."""
    return torch.tensor([i % num_classes for i in indices], dtype=torch.int64)


def permutation(n: int, *parts: int | str) -> Tensor:
    """A permutation of range(n) keyed by parts, [n] int64: the order of an epoch."""
    return torch.randperm(n, generator=generator("order", *parts))


def uniforms(count: int, *parts: int | str) -> list[float]:
    """`count` uniform numbers on [0, 1) keyed by parts: the crop and flip of a sample."""
    return torch.rand(count, generator=generator("uniforms", *parts)).tolist()
