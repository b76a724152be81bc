"""Checks that the gradients of a network reach all weights that are trained."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.training.world import World


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
