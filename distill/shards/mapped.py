"""Shards that are mapped into memory: their values are read when they are used, and a few files are open at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distill.core.errors import RunError
from distill.core.text import printable

S = TypeVar("S")
Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # data type and shape of each tensor, by name


def load(path: Path, expected: Specs) -> dict[str, Tensor]:
    """The tensors of a shard, mapped into memory. RunError if it cannot be read or does not have these tensors."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} was complete at the start, but cannot be read now: {error}") from error
    found = {name: (values.dtype, tuple(values.shape)) for name, values in tensors.items()}
    if found != expected:
        raise RunError(f"{path} contains {_told(found)}, but its manifest.json lists {_told(expected)}")
    return tensors


def _told(tensors: Specs) -> str:
    return printable(", ".join(f"{n} {str(d)[6:]} {list(shape)}" for n, (d, shape) in sorted(tensors.items())))


class LatestShards(Generic[S]):
    """Opens shards when they are asked for, and keeps the `most` that were used last. Others are closed."""

    def __init__(self, load: Callable[[int], S], most: int) -> None:
        self.load, self.most = load, most
        self.held: dict[int, S] = {}

    def __getitem__(self, number: int) -> S:
        shard = self.held.pop(number, None)
        if shard is None:
            while len(self.held) >= self.most:  # before another one is opened
                del self.held[next(iter(self.held))]
            shard = self.load(number)
        self.held[number] = shard
        return shard
