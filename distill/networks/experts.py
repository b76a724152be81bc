"""Two networks of one velocity field, each for a part of the times, like those of Wan 2.2."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.flow.fields import rows_to_call
from distill.protocols import Cond, NetworkCall


class Experts(nn.Module):
    """`transformer` for the times from `boundary` on, where there is more noise, and `transformer_2` below.

    boundary: in the units of the time with which the networks are called.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, boundary: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of `transformer`."""
        config: Mapping[str, Any] = self.transformer.config
        return config

    def called(self, call: NetworkCall, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Calls each network on its rows, with call(network, x_t, time, cond). Both are always called, as under ZeRO-3
        every process must take part in the calls of the others.
        """
        early = time >= self.boundary
        first, second = rows_to_call(early), rows_to_call(~early)
        parts = [
            call(network, x_t[rows], time[rows], {name: each[rows] for name, each in cond.items()})
            for network, rows in ((self.transformer, first), (self.transformer_2, second))
        ]
        found = torch.empty_like(x_t, dtype=parts[0].dtype)
        # A network without rows of its own was called on row 0; the other one's result for that row is kept.
        order = [(second, parts[1]), (first, parts[0])] if bool(early[0]) else [(first, parts[0]), (second, parts[1])]
        for rows, part in order:
            found = found.index_copy(0, rows, part)
        return found
