"""A network with an optimizer of its own: backward, gradient norm, clipped step, and its state by parameter name.

The engine sees only these methods. Here every rank holds all of it; `sharded.Sharded` divides it.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from distill.core.errors import InputError, RunError
from distill.spec.model import OptimizerSpec
from distill.training.world import ALONE, World

BUCKET = 50_000_000  # elements that are sent at once, at most
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


class Trainable:
    """`module` under AdamW, on its device in fp32. Parameters that come with requires_grad=False stay as they are.

    Ranks average their gradients before the step. What waits for all ranks: `backward`, `check_reach`, `gradient_norm`,
    `step`, `whole`, `gather`, `weights`, `unmoved`, `state`.

    waiting: parameters that the first turns need not reach, see `protocols.Trained`.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        spec: OptimizerSpec,
        world: World = ALONE,
        *,
        waiting: tuple[str, ...] = (),
    ) -> None:
        self.name, self.module, self.spec, self.world = name, module, spec, world
        # Tied weights keep both names: a state dict holds both, and an average must not lack one.
        named = dict(module.named_parameters(remove_duplicate=False))
        self._parameters = {key: p for key, p in named.items() if p.requires_grad}
        if not self._parameters:
            raise ValueError(f"network '{name}' is Trained, but none of its parameters has requires_grad=True")
        for key, p in self._parameters.items():
            if p.dtype != torch.float32:
                raise ValueError(f"network '{name}': {key} is {p.dtype}; trained weights are torch.float32")
        self._unique = list(dict.fromkeys(self._parameters.values()))
        self.sizes = [p.numel() for p in self._unique]
        device = self._unique[0].device
        fused = device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.AdamW(
            self._unique,
            lr=spec.lr,
            betas=spec.betas,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            fused=fused,
            foreach=None if fused else True,
        )
        self._active: bool | None = None
        self._reach = Reach(name, self._parameters, waiting)

    @property
    def waiting(self) -> set[str]:
        """Names of the parameters that the first turns need not reach."""
        return self._reach.waiting

    @property
    def callable(self) -> nn.Module:
        """What the loss of its own turn calls."""
        return self.module

    def activate(self, active: bool) -> None:
        """Active: in train() with gradients; else in eval() and frozen, though gradients may flow through it."""
        if active == self._active:
            return
        self._active = active
        self.module.train(active)
        for parameter in self._unique:
            parameter.requires_grad_(active)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (already divided by the number of micro-batches)."""
        loss.backward()

    def check_reach(self) -> None:
        """InputError if the first turns' backward passes left trained weights without a gradient, on all ranks."""
        self._reach.check(self.world)

    def gradient_norm(self) -> Tensor:
        """Global norm of the gradients, before clipping; they are the means over the ranks from now on.

        What a turn does not reach has gradient 0, as where gradients are divided: moments and weight decay continue.
        """
        for p in self._unique:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in self._unique if p.grad is not None]
        if self.world.size > 1:
            for bucket in buckets({i: grad.numel() for i, grad in enumerate(grads)}):
                mean = self.world.mean(torch.cat([grads[i].reshape(-1) for i in bucket]))
                for i, part in zip(bucket, mean.split([grads[i].numel() for i in bucket]), strict=True):
                    grads[i].copy_(part.view_as(grads[i]))
        return torch.nn.utils.get_total_norm(grads)

    def step(self, lr: float, norm: Tensor) -> None:
        """Clip, move the weights, clear the gradients."""
        if self.spec.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._unique, self.spec.clip, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def masters(self) -> dict[str, Tensor]:
        """The fp32 weights that move, by name: what this rank has of them."""
        return dict(self._parameters)

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors by name from tensors that are divided as `masters`; on rank 0 at least."""
        return dict(parts)

    def scatter(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors divided as `masters` from whole ones."""
        return {key: whole[key] for key in self._parameters}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While entered, the module's own parameters are whole, on every rank."""
        yield

    def weights(self) -> dict[str, Tensor]:
        """The whole state dict; on rank 0 at least."""
        return self.module.state_dict()

    def unmoved(self) -> dict[str, Tensor]:
        """What of the state dict the optimizer does not move: buffers and frozen parameters, whole on every rank."""
        return {key: t for key, t in self.module.state_dict().items() if key not in self._parameters}

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as "PARAMETER/MOMENT"; none before the first step."""
        moments = self._optimizer.state
        return {f"{key}/{name}": t for key, p in self._parameters.items() for name, t in moments.get(p, {}).items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave: nothing, if it was taken before the first step."""
        self._refuse_unknown(tensors)
        if not tensors:
            return
        self._reach.close()  # what the turns before reached is not known any more
        moments: dict[int, dict[str, Tensor]] = {}
        number = {p: i for i, p in enumerate(self._unique)}
        for full, tensor in tensors.items():
            key, _, name = full.rpartition("/")
            moments.setdefault(number[self._parameters[key]], {})[name] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def close(self) -> None:
        """Let go of what would outlive this object."""

    def _refuse_unknown(self, tensors: Mapping[str, Tensor]) -> None:
        for full in tensors:
            if (key := full.rpartition("/")[0]) not in self._parameters:
                raise RunError(f"the optimizer state of network '{self.name}' has '{key}', the network does not")

    def live(self) -> dict[str, list[Tensor]]:
        """The tensors of this rank by kind: "parameters", "gradients", "optimizer" (master weights are among them)."""
        return {
            "parameters": list(self.module.parameters()),
            "gradients": [p.grad for p in self._unique if p.grad is not None],
            "optimizer": [t for moments in self._optimizer.state.values() for t in moments.values()],
        }
