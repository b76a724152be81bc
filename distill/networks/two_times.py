"""Networks of any class as flow maps, with a second time or without, and with an acceleration.

All start as the velocity network that they are made from.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from distill.flow.conditioning import GUIDANCE_SCALE, without_guidance
from distill.networks.experts import Experts
from distill.networks.second_time import SecondTime
from distill.protocols import Cond, NetworkCall


def recomputed(module: Callable[..., object], *inputs: object) -> object:
    """Calls module(*inputs). Its activations are computed again in the backward pass, instead of being kept."""
    return torch.utils.checkpoint.checkpoint(module, *inputs, use_reentrant=False)


class TwoTimes(nn.Module):
    """u(x_t, t, s) from a network v(x_t, t): an embedding of t - s is added to the network's embeddings of the time.

    layers: names of the modules of `network` that embed the time, as [B, width]. gap: the embedding of t - s, and of
    cond["guidance_scale"] [B] if it takes it, which the network does not get.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], gap: SecondTime) -> None:
        super().__init__()
        self.network, self.layers, self.gap = network, tuple(layers), gap
        self._embedded: Tensor | None = None  # of the current call
        self._has_one_time = False  # while it is called without t - s
        for name in layers:
            network.get_submodule(name).register_forward_hook(self._add)

    def forward(self, call: NetworkCall, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """x_t [B, ...], t and s [B] in [0, 1] -> average velocity like x_t."""
        self._embedded = self.gap(t - s, cond.get(GUIDANCE_SCALE))
        try:
            return call(self.network, x_t, t, without_guidance(cond))
        finally:
            self._embedded = None  # it belongs to the graph of this call, with which the network could not be copied

    def checkpoint(self, module: nn.Module, *inputs: object) -> object:
        """Calls a module of the network, whose activations are recomputed later, with the second time of this call."""
        embedded = self._embedded

        def again(*given: object) -> object:
            now, self._embedded = self._embedded, embedded
            try:
                return module(*given)
            finally:
                self._embedded = now

        return recomputed(again, *inputs)

    @contextmanager
    def with_one_time(self) -> Iterator[None]:
        """Context manager: `network` may be called directly, as a network with one time."""
        self._has_one_time = True
        try:
            yield
        finally:
            self._has_one_time = False

    def _add(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        if self._has_one_time:
            return output
        assert self._embedded is not None, "call a network with two times through TwoTimes"
        embedded = self._embedded
        if isinstance(self.network, Experts):  # the module belongs to one of two networks, which has a part of the rows
            embedded = embedded[self.network.rows[self.network.now]]
        return output + embedded.to(output.dtype)


class ToData(nn.Module):
    """u(x_t, t, 0) from a network v(x_t, t), for flow maps that only jump to data: the network needs no second time."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, call: NetworkCall, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """x_t [B, ...], t [B] in [0, 1] -> average velocity from t to 0, like x_t. s [B] is not used."""
        return call(self.network, x_t, t, cond)


class TwoNetworks(nn.Module):
    """A network of the velocity v(x_t, t), and one of the acceleration a(x_t, t | v) with twice the input channels."""

    def __init__(self, velocity: nn.Module, acceleration: nn.Module) -> None:
        super().__init__()
        self.velocity, self.acceleration = velocity, acceleration
