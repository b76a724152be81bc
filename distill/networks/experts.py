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
        self.called_now = [0, 1]  # the networks that were called in the last call
        self.now = 0  # the network that is being called

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of `transformer`."""
        config: Mapping[str, Any] = self.transformer.config
        return config

    def called(self, call: NetworkCall, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Calls each network on its rows, with call(network, x_t, time, cond).

        A network without rows of its own is called, on row 0, only if gradients are enabled or its weights are divided:
        then every process must take part in the calls of the others.
        """
        networks, self.early = (self.transformer, self.transformer_2), time >= self.boundary
        self.rows = (rows_to_call(self.early), rows_to_call(~self.early))
        has_rows = (bool(self.early.any()), not bool(self.early.all()))
        self.called_now = [i for i in (0, 1) if has_rows[i] or torch.is_grad_enabled() or _is_divided(networks[i])]
        parts = []
        for i in self.called_now:
            self.now, rows = i, self.rows[i]
            parts.append(call(networks[i], x_t[rows], time[rows], {name: each[rows] for name, each in cond.items()}))
        return self.joined(parts)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Outputs of the networks that were called for their rows of the last call -> [B, ...]."""
        first = 1 if bool(self.early[0]) else 0  # the network whose row 0 counts comes last
        found = parts[0].new_empty(len(self.early), *parts[0].shape[1:])
        for i, part in sorted(zip(self.called_now, parts, strict=True), key=lambda each: each[0] != first):
            found = found.index_copy(0, self.rows[i], part)
        return found


def _is_divided(network: nn.Module) -> bool:
    """Whether DeepSpeed has divided the weights of a network among processes."""
    return any("ds_id" in vars(each) for each in network.parameters())
