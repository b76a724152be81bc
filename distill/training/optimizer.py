"""Shared by all ways to divide networks: learning rates, parameter groups, a check that gradients reach all weights."""

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.protocols import Trained
from distill.spec.model import OptimizerSpec
from distill.training.world import World

BUCKET = 50_000_000  # most elements that are sent at once
FACTOR = "lr_factor"  # key in a parameter group: the factor of the stage's learning rate
Key = TypeVar("Key", int, str)


def learning_rate(spec: OptimizerSpec, images: float, total: int) -> float:
    """Learning rate after `images` of `total` images.

    Linear warm-up, then constant, or cosine or linear decay to 0 at `total`. The engine passes the middle of each step,
    so that neither the first nor the last step has learning rate 0.
    """
    if images < spec.warmup_images:
        return spec.lr * images / spec.warmup_images
    rest = total - spec.warmup_images
    progress = min(1.0, (images - spec.warmup_images) / rest) if rest > 0 else 0.0
    match spec.decay:
        case "constant":
            return spec.lr
        case "linear":
            return spec.lr * (1 - progress)
        case "cosine":
            return spec.lr * 0.5 * (1 + math.cos(math.pi * progress))


def buckets(sizes: Mapping[Key, int]) -> Iterator[list[Key]]:
    """Split the keys, in order, into groups of at most `BUCKET` elements; a larger tensor is a group of its own."""
    group: list[Key] = []
    for key, size in sizes.items():
        if group and sum(sizes[other] for other in group) + size > BUCKET:
            yield group
            group = []
        group.append(key)
    yield group


def parameter_groups(network: str, role: Trained, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer, one for each learning rate, with the factor of the stage's learning rate.

    ValueError if a pattern of `role.groups` matches no trained parameter, or two patterns match the same one.
    """
    chosen: dict[nn.Parameter, str] = {}  # a tied parameter has several names but one factor
    for pattern in role.groups:
        matched = {p for key, p in parameters.items() if fnmatchcase(key, pattern)}
        if not matched:
            raise ValueError(f"network '{network}': groups names '{pattern}', but no trained parameter has this name")
        for key, p in parameters.items():
            if p in matched and chosen.setdefault(p, pattern) != pattern:
                raise ValueError(
                    f"network '{network}': groups names '{key}' by two patterns, '{chosen[p]}' and '{pattern}'; give "
                    "each parameter at most one"
                )
    found: dict[float, list[nn.Parameter]] = {}
    for p in dict.fromkeys(parameters.values()):
        found.setdefault(role.lr * role.groups.get(chosen.get(p, ""), 1.0), []).append(p)
    return [{"params": group, FACTOR: factor} for factor, group in found.items()]


class Reach:
    """Checks that every trained parameter gets a gradient in the network's first `TURNS` turns.

    A parameter without any gradient does not influence the loss: only weight decay would change it. A gradient of zero
    is accepted, because layers that are initialised to zero block the gradients of others at first.

    waiting: names or patterns of parameters that need no gradient in these turns. ValueError if one matches nothing.
    """

    TURNS = 2

    def __init__(self, network: str, parameters: Mapping[str, nn.Parameter], waiting: tuple[str, ...]) -> None:
        for pattern in waiting:
            if not any(fnmatchcase(key, pattern) for key in parameters):
                raise ValueError(
                    f"network '{network}': waiting names '{pattern}', but no trained parameter has this name"
                )
        self._network, self._turns = network, 0
        waits = {p for key, p in parameters.items() if any(fnmatchcase(key, pattern) for pattern in waiting)}
        self.waiting = {key for key, p in parameters.items() if p in waits}  # with all names of tied ones
        self._names = [key for key in parameters if key not in self.waiting]
        self._reached = dict.fromkeys(parameters, False)
        self._device = next(iter(parameters.values())).device
        # Hooks, because DeepSpeed removes a gradient as soon as it is computed.
        self._hooks = [parameters[key].register_hook(partial(self._note, key)) for key in self._names]

    def _note(self, key: str, gradient: Tensor | None) -> None:
        self._reached[key] = self._reached[key] or gradient is not None

    def close(self) -> None:
        """Stop checking."""
        self._turns = self.TURNS
        for hook in self._hooks:
            hook.remove()

    def check(self, world: World) -> None:
        """Call after the backward passes of each turn, on every rank.

        InputError after the last checked turn if parameters got no gradient on any rank.
        """
        if self._turns == self.TURNS:
            return
        self._turns += 1
        if self._turns < self.TURNS:
            return
        self.close()
        mine = torch.tensor([float(self._reached[key]) for key in self._names], device=self._device)
        found = world.mean(mine).tolist() if self._names else []
        missed = [key for key, share in zip(self._names, found, strict=True) if not share]
        if missed:
            more = f" and {len(missed) - 5} more" if len(missed) > 5 else ""
            raise InputError(
                f"network '{self._network}': in its first {self.TURNS} turns no backward pass reached {len(missed)} of "
                f"its {len(found)} trained parameters: {', '.join(missed[:5])}{more}. In the recipe, set "
                "requires_grad=False where a parameter is not to be trained; name it in Trained(waiting=...) if only "
                "later turns reach it"
            )
