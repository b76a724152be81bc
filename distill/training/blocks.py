"""How the blocks of trained networks run: whether their activations are recomputed or offloaded, and compiled."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import nn
from torch.autograd.graph import save_on_cpu

from distill.core.errors import InputError
from distill.launch import environment
from distill.networks.two_times import TwoTimes, recomputed
from distill.teachers.architectures import convention_of


@dataclass(frozen=True)
class Blocks:
    """How blocks run. The values are those without these options, except that `compiled` code rounds differently."""

    recompute: bool = False
    """recompute activations in the backward pass instead of keeping them"""
    offload: bool = False
    """keep what must be kept of them, the inputs of each block, in the memory of the host"""
    compiled: bool = False
    """compile networks with torch.compile, block by block where blocks repeat"""


EAGER = Blocks()


def recompute(recipe: str, networks: Iterable[nn.Module], *, offload: bool = False) -> None:
    """Turn on activation checkpointing. InputError if no network supports it. recipe: its name, for the message."""
    parts = [m for network in networks for m in network.modules() if isinstance(m, ModelMixin)]
    able = [part for part in parts if part._supports_gradient_checkpointing]
    if not able:
        raise InputError(
            f"launch.activation_checkpointing: no network that recipe '{recipe}' trains has blocks that can be "
            "recomputed, so this has no effect; remove it"
        )
    two_times = [m for network in networks for m in network.modules() if isinstance(m, TwoTimes)]
    for part in able:
        owner = next((each for each in two_times if part in each.modules()), None)
        checkpoint = recomputed if owner is None else owner.checkpoint
        if offload:
            checkpoint = _offloaded(checkpoint)
        convention = convention_of(part)
        part.enable_gradient_checkpointing(
            checkpoint if convention is None else convention.recomputing(part, checkpoint)
        )


def _offloaded(checkpoint: Callable[..., object]) -> Callable[..., object]:
    """Calls blocks as `checkpoint` does, and keeps their inputs in the host's memory until the backward pass."""

    def call(module: Callable[..., object], *inputs: object) -> object:
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return checkpoint(module, *inputs)

    return call


def compile_networks(networks: Iterable[nn.Module]) -> None:
    """Compile networks in place: their repeated blocks, or the whole network if its class has none.

    InputError if there is no C++ compiler.
    """
    if not environment.has_compiler():
        raise InputError("compile: no C++ compiler found (g++, clang++ or c++); install one, or set compile: false")
    for network in networks:
        parts = [each for each in network.modules() if isinstance(each, ModelMixin)]
        outer = [part for part in parts if not any(part is not each and part in each.modules() for each in parts)]
        if not outer:
            network.compile()
        for part in outer:
            blocks = [each for each in part.modules() if type(each).__name__ in (part._repeated_blocks or ())]
            for each in blocks or [part]:
                each.compile()
