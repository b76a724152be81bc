"""What trained networks have in common, however they are divided: learning rates, groups of parameters, and which of
them the first turns reach.
"""

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

BUCKET = 50_000_000  # elements that are sent at once, at most
FACTOR = "lr_factor"  # of a group of the optimizer's parameters: what multiplies the learning rate of the stage
Key = TypeVar("Key", int, str)


def learning_rate(spec: OptimizerSpec, images: float, total: int) -> float:
    """lr after `images` of `total` images: linear warm-up, then constant, or cosine or linear decay to 0 at `total`.

    The engine asks at the middle of a step, so neither the first nor the last step is spent at lr 0.
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
    """Keys in order, in groups of at most `BUCKET` elements, or of one tensor."""
    group: list[Key] = []
    for key, size in sizes.items():
        if group and sum(sizes[other] for other in group) + size > BUCKET:
            yield group
            group = []
        group.append(key)
    yield group


def parameter_groups(network: str, role: Trained, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The parameters in groups of the same learning rate, each with its factor of the stage's."""
    chosen: dict[nn.Parameter, str] = {}  # tied ones have several names, and one factor
    for pattern in role.groups:
        matched = {p for key, p in parameters.items() if fnmatchcase(key, pattern)}
        if not matched:
            raise ValueError(f"network '{network}': groups names '{pattern}', but no trained parameter is so named")
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
    """Which parameters the backward passes of a network's first turns reach. What none reaches is refused by name.

    A gradient of zero counts as reached: layers that begin at zero pass nothing on at first. No gradient at all means
    that the loss does not depend on the parameter; that would train on, moved by weight decay alone.
    """

    TURNS = 2

    def __init__(self, network: str, parameters: Mapping[str, nn.Parameter], waiting: tuple[str, ...]) -> None:
        for pattern in waiting:
            if not any(fnmatchcase(key, pattern) for key in parameters):
                raise ValueError(
                    f"network '{network}': waiting names '{pattern}', but no trained parameter is so named"
                )
        self._network, self._turns = network, 0
        waits = {p for key, p in parameters.items() if any(fnmatchcase(key, pattern) for pattern in waiting)}
        self.waiting = {key for key, p in parameters.items() if p in waits}  # tied ones have several names
        self._names = [key for key in parameters if key not in self.waiting]
        self._reached = dict.fromkeys(parameters, False)
        self._device = next(iter(parameters.values())).device
        # A hook, as DeepSpeed takes gradients away as soon as they are there.
        self._hooks = [parameters[key].register_hook(partial(self._note, key)) for key in self._names]

    def _note(self, key: str, gradient: Tensor | None) -> None:
        self._reached[key] = self._reached[key] or gradient is not None

    def close(self) -> None:
        """Look no more: the first turns are over."""
        self._turns = self.TURNS
        for hook in self._hooks:
            hook.remove()

    def check(self, world: World) -> None:
        """After the backward passes of each turn; every rank must call it."""
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
