"""The interfaces between the training loop and the ways to divide networks among processes.

`plain` and `zero` implement them. For another way, add such a file, and select it in `choice`.
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
from distill.training.checkpoint_files import GroupReader
from distill.training.optimizers import Optimizers
from distill.training.parts import RankParts
from distill.training.world import World

Sizes = Mapping[str, Sequence[int]]  # elements of each parameter, by network


@runtime_checkable
class Trainable(Protocol):
    """A network with its own optimizer. Parameters that have requires_grad=False at the start are not trained.

    All ranks must call these methods together: `backward`, `check_reach`, `gradient_norm`, `step`,
    `load_masters`, `whole`, `parts`.
    """

    @property
    def module(self) -> nn.Module: ...
    @property
    def callable(self) -> nn.Module: ...  # the module that the loss of its own turn calls
    @property
    def sizes(self) -> Sequence[int]: ...  # elements of each trained parameter
    @property
    def still(self) -> Sequence[int]: ...  # elements of each parameter that is not trained
    @property
    def optimizers(self) -> Optimizers: ...
    @property
    def waiting(self) -> set[str]: ...  # names of parameters that need no gradient in the first turns

    def activate(self, active: bool) -> None:
        """Active: set train() mode and requires_grad. Else set eval() mode and freeze; gradients may flow through."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, which is already divided by the number of micro-batches."""

    def check_reach(self) -> None:
        """InputError if trained weights got no gradient in the first turns, on any rank. Called once per turn."""

    def gradient_norm(self) -> Tensor:
        """Global norm of the gradients, averaged over the ranks, before clipping. A missing gradient counts as 0."""

    def step(self, lr: float, norm: Tensor) -> None:
        """Clip the gradients, update the weights, clear the gradients. lr: the stage's. norm: of `gradient_norm`."""

    def masters(self) -> dict[str, Tensor]:
        """The trained fp32 weights by name, or this rank's parts of them."""

    def read(self, group: GroupReader) -> dict[str, Tensor]:
        """Tensors of a checkpoint, divided in the same way as `masters`."""

    def load_masters(self, group: GroupReader) -> None:
        """Load `masters` of a checkpoint, if a `Sharding` divides the weights of trained networks."""

    def whole(self) -> AbstractContextManager[None]:
        """A context in which the module's parameters are whole on every rank."""

    def parts(self, own: Mapping[str, Tensor]) -> RankParts:
        """This rank's part of a state dict whose trained weights are `own`, divided in the same way as `masters`.

        All other tensors of the state dict, buffers and frozen parameters, are those of the network.
        """

    def state(self) -> RankParts:
        """This rank's part of the optimizer's state, as "PARAMETER/MOMENT". Empty before the first step."""

    def load_state(self, group: GroupReader) -> None:
        """Load what `state` returned. RunError if it has a parameter that the network does not have."""

    def live(self) -> dict[str, list[Tensor]]:
        """This rank's tensors by kind: "parameters", "gradients", "optimizer" (with separate master weights)."""

    def close(self) -> None:
        """Free resources that would otherwise stay after this object is deleted."""


@dataclass(frozen=True)
class Held:
    """Numbers of float32 elements that a process has in memory just before an optimizer step."""

    parameters: int
    gradients: int
    optimizer: int
    """moments, and master weights if they are not the parameters themselves"""
    masters: Mapping[str, int]
    """elements of `Trainable.masters`, by network"""


@runtime_checkable
class Sharding(Protocol):
    """A way to divide networks among processes."""

    @property
    def record(self) -> Mapping[str, str | int]: ...  # the options of `launch`, for the environment in checkpoints
    @property
    def divides_trained(self) -> bool: ...  # whether weights of trained networks are divided; they may be on the CPU
    @property
    def divides_frozen(self) -> bool: ...  # the same for frozen networks, including the teacher

    def wrap(
        self, name: str, role: Trained, spec: OptimizerSpec, world: World, device: torch.device, slices: list[Rows]
    ) -> Trainable:
        """The network `name` of a recipe, ready to be trained in micro-batches of the rows `slices`."""

    def divide(self, network: nn.Module, device: torch.device, world: World) -> None:
        """Divide the weights of a frozen network among the ranks, in place. Only if `divides_frozen`."""

    def held(self, sizes: Sizes, still: Sizes, procs: int) -> Held:
        """What each of `procs` processes has in memory.

        sizes: of the trained parameters. still: of the parameters that are not trained.
        """
