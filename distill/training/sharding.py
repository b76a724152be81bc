"""What the loop needs of a network that is trained, and of whoever divides networks among the processes.

`plain` and `zero` fit these protocols. Another way to divide networks is one more such file and its choice in `choice`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from distill.flow.draws import Rows
from distill.protocols import Trained
from distill.spec.model import OptimizerSpec
from distill.training.world import World

Sizes = Mapping[str, Sequence[int]]  # elements of each parameter, by network


@runtime_checkable
class Trainable(Protocol):
    """A network with an optimizer of its own; its parameters that come with requires_grad=False stay as they are.

    All ranks must call these together: `backward`, `check_reach`, `gradient_norm`, `step`, `whole`, `gather`,
    `weights`, `unmoved`, `state`.
    """

    @property
    def module(self) -> nn.Module: ...
    @property
    def callable(self) -> nn.Module: ...  # what the loss of its own turn calls
    @property
    def sizes(self) -> Sequence[int]: ...  # elements of each trained parameter
    @property
    def still(self) -> Sequence[int]: ...  # elements of each parameter that stays as it is
    @property
    def waiting(self) -> set[str]: ...  # names of the parameters that the first turns need not reach

    def activate(self, active: bool) -> None:
        """Active: in train() with gradients; else in eval() and frozen, though gradients may flow through it."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (already divided by the number of micro-batches)."""

    def check_reach(self) -> None:
        """InputError if the first turns' backward passes left trained weights without a gradient, on all ranks."""

    def gradient_norm(self) -> Tensor:
        """Global norm of the gradients' means over the ranks, before clipping. What no turn reached has gradient 0."""

    def step(self, lr: float, norm: Tensor) -> None:
        """Clip, move the weights, clear the gradients. lr: of the stage."""

    def masters(self) -> dict[str, Tensor]:
        """The fp32 weights that move, by name: what this rank has of them."""

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors by name from tensors that are divided as `masters`; on rank 0 at least."""

    def scatter(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors divided as `masters` from whole ones."""

    def whole(self) -> AbstractContextManager[None]:
        """While entered, the module's own parameters are whole, on every rank."""

    def weights(self) -> dict[str, Tensor]:
        """The whole state dict; on rank 0 at least."""

    def unmoved(self) -> dict[str, Tensor]:
        """What of the state dict the optimizer does not move: buffers and frozen parameters, whole on every rank."""

    def state(self) -> dict[str, Tensor]:
        """The optimizer's whole tensors as "PARAMETER/MOMENT", on rank 0 at least; none before the first step."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave: nothing, if it was taken before the first step."""

    def live(self) -> dict[str, list[Tensor]]:
        """The tensors of this rank by kind: "parameters", "gradients", "optimizer" (master weights are among them)."""

    def close(self) -> None:
        """Let go of what would outlive this object."""


@dataclass(frozen=True)
class Held:
    """Elements in float32 that a process holds for the networks of a training, just before an optimizer step."""

    parameters: int
    gradients: int
    optimizer: int
    """its moments, and master weights where they are not the parameters themselves"""
    masters: Mapping[str, int]
    """of `Trainable.masters`, by network"""


@runtime_checkable
class Sharding(Protocol):
    """Which process holds what of the networks of a training."""

    @property
    def record(self) -> Mapping[str, str | int]: ...  # for the environment that checkpoints note, as `launch` names it
    @property
    def divides_trained(self) -> bool: ...  # the weights of trained networks, which may then come on the CPU
    @property
    def divides_frozen(self) -> bool: ...  # those of frozen ones, the teacher's too, which may then come on the CPU

    def wrap(
        self, name: str, role: Trained, spec: OptimizerSpec, world: World, device: torch.device, slices: list[Rows]
    ) -> Trainable:
        """The network `name` of a recipe, ready to be trained in micro-batches of these rows."""

    def divide(self, network: nn.Module, device: torch.device, world: World) -> None:
        """Divide a frozen network's weights among the ranks, in place, where `divides_frozen`."""

    def held(self, sizes: Sizes, still: Sizes, procs: int) -> Held:
        """Of each of `procs` processes. sizes: of the parameters that are trained; still: of the others."""
