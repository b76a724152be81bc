"""Networks of the class of another one in a smaller size, which start with the weights of some of its layers.

Of a list of n blocks, k blocks start from n's first, last and those evenly spaced between them. That is how students
with fewer layers are initialised elsewhere: DistilBERT (Sanh et al. 2019, arXiv 1910.01108) takes every second layer,
Distil-Whisper (Gandhi et al. 2023, arXiv 2311.00430) layers as far from each other as possible. In U-Nets, BK-SDM (Kim
et al. 2023, arXiv 2305.15798) keeps the first of two layers of a level on the way down, and the first and the last of
three on the way up, which is the same; if levels are missing, the deepest ones are, as here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from distill.networks.architectures import drawn

FROM_START, FROM_END = "down_blocks", "up_blocks"  # lists of the levels of a U-Net


@dataclass(frozen=True)
class Inheritance:
    """Where the weights of a smaller network come from."""

    blocks: Mapping[str, Sequence[int | None]]
    """for each list of blocks in which the networks differ, by its name in the smaller one: the block of the larger one
    that each starts from; None: it is new"""
    copied: Mapping[str, str]
    """name of each weight that is copied -> its name in the larger network; all others are new"""


def spaced(count: int, of: int) -> list[int]:
    """Which of `of` blocks `count` blocks start from: the first, the last, and evenly spaced ones (halves go up).

    If there are more blocks than that, some are used repeatedly.
    """
    if count == 1 or of == 1:
        return [0] * count
    return [(2 * i * (of - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]


def inheritance(small: nn.Module, large: nn.Module) -> Inheritance:
    """Which weights a smaller network takes from a larger one of its class.

    A layer is copied with all its weights if the corresponding layer has weights of the same names and shapes.
    """
    blocks: dict[str, Sequence[int | None]] = {}
    copied: dict[str, str] = {}
    for ours, module, theirs, other in _corresponding(small, large, "", "", blocks):
        own, given = _own(module), _own(other)
        if type(module) is type(other) and _shapes(own) == _shapes(given):
            copied |= {ours + name: theirs + name for name in own}
    return Inheritance(blocks, copied)


def smaller(network: ModelMixin, config: Mapping[str, object], seed: int, name: str) -> ModelMixin:
    """A network of the same class with another config, in float32, on the device of the network.

    Its weights are those of `inheritance`; the others are drawn from (seed, name). They do not depend on anything else.
    If the network is on the meta device, so is the new one.
    """
    if network.device.type == "meta":
        with torch.device("meta"):
            return type(network).from_config(dict(config))
    with drawn(seed, name):
        found = type(network).from_config(dict(config)).float()
    given, weights = network.state_dict(), found.state_dict()
    with torch.no_grad():
        for ours, theirs in inheritance(found, network).copied.items():
            weights[ours].copy_(given[theirs])
    return found.to(network.device)


def _corresponding(
    small: nn.Module, large: nn.Module, ours: str, theirs: str, blocks: dict[str, Sequence[int | None]]
) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """The modules of both networks in pairs, each after the prefix of the names of its weights. Adds to `blocks`."""
    yield ours, small, theirs, large
    others = dict(large.named_children())
    at = {name: name for name, _ in small.named_children()}
    if isinstance(small, nn.ModuleList) and len(small) != len(large):
        origins = _origins(ours[:-1], len(small), len(others))
        blocks[ours[:-1]] = origins
        at = {str(i): str(origin) for i, origin in enumerate(origins)}
    for name, module in small.named_children():
        if (other := others.get(at[name])) is not None:
            yield from _corresponding(module, other, f"{ours}{name}.", f"{theirs}{at[name]}.", blocks)


def _origins(name: str, count: int, of: int) -> list[int | None]:
    """The blocks of a list of `of` that the `count` blocks of a list with this name start from."""
    last = name.rpartition(".")[2]
    if last in (FROM_START, FROM_END):
        first = 0 if last == FROM_START else of - count
        return [i if 0 <= i < of else None for i in range(first, first + count)]
    return [*spaced(count, of)] if of else [None] * count


def _own(module: nn.Module) -> dict[str, Tensor]:
    """The weights that are stored for the module itself."""
    return {name: each for name, each in module.state_dict().items() if "." not in name}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: each.shape for name, each in tensors.items()}
