"""Two networks of one velocity field, each for a part of the times, like those of Wan 2.2."""

from collections.abc import Mapping, Sequence
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
        self.early = torch.empty(0)  # [B] bool in the last call: the rows of the first network
        self.rows: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))  # with which each network was called
        self.now = 0  # the network that is being called

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of `transformer`."""
        config: Mapping[str, Any] = self.transformer.config
        return config

    def called(self, call: NetworkCall, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Calls each network on its rows, with call(network, x_t, time, cond).

        Both are always called, as under ZeRO-3 every process must take part in the calls of the others: a network
        without rows of its own is called on row 0.
        """
        self.early = time >= self.boundary
        self.rows = (rows_to_call(self.early), rows_to_call(~self.early))
        parts = []
        for i, network in enumerate((self.transformer, self.transformer_2)):
            self.now, rows = i, self.rows[i]
            parts.append(call(network, x_t[rows], time[rows], {name: each[rows] for name, each in cond.items()}))
        return self.joined(parts)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Outputs of both networks for their rows of the last call -> [B, ...]."""
        order = (1, 0) if bool(self.early[0]) else (0, 1)  # the network whose row 0 counts comes last
        found = parts[0].new_empty(len(self.early), *parts[0].shape[1:])
        for i in order:
            found = found.index_copy(0, self.rows[i], parts[i])
        return found
