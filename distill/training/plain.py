"""Data-parallel training in plain PyTorch: every process has the whole networks, and gradients are averaged."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from distill.core.errors import RunError
from distill.flow.draws import Rows
from distill.networks.sharing import is_shared, own_state
from distill.protocols import Trained
from distill.spec.model import OptimizerSpec
from distill.training import optimizers
from distill.training.averaging import Averaging
from distill.training.checkpoint_files import GroupReader
from distill.training.parts import RankParts, share_of
from distill.training.reach import Reach
from distill.training.sharding import Held, Sizes
from distill.training.world import ALONE, World


class PlainTrainable:
    """The network of `role` with its optimizers, on the network's device. Implements `sharding.Trainable`.

    ValueError if no parameter has requires_grad=True, or if one that has is not float32.

    passes: number of backward passes for each optimizer step.
    """

    def __init__(self, name: str, role: Trained, spec: OptimizerSpec, world: World = ALONE, passes: int = 1) -> None:
        self.name, self.module, self.spec, self.world, self.passes = name, role.module, spec, world, passes
        # Tied weights keep all their names, as in a state dict: averages must contain all of them.
        named = dict(self.module.named_parameters(remove_duplicate=False))
        self._parameters = {key: p for key, p in named.items() if p.requires_grad}
        if not self._parameters:
            raise ValueError(f"network '{name}' is Trained, but none of its parameters has requires_grad=True")
        for key, p in self._parameters.items():
            if p.dtype != torch.float32:
                raise ValueError(f"network '{name}': {key} is {p.dtype}; trained weights are torch.float32")
        self._unique = list(dict.fromkeys(self._parameters.values()))
        self.sizes = [p.numel() for p in self._unique]
        self.still = [p.numel() for p in self.module.parameters() if not p.requires_grad and not is_shared(p)]
        groups = optimizers.parameter_groups(name, role, self._parameters)
        self.optimizers = optimizers.Optimizers(spec, name, self.module, groups)
        self._active: bool | None = None
        self._passes = 0  # since the last step
        self._reach = Reach(name, self._parameters, role.waiting)

    @property
    def waiting(self) -> set[str]:
        return self._reach.waiting

    @property
    def callable(self) -> nn.Module:
        return self.module

    def activate(self, active: bool) -> None:
        if active == self._active:
            return
        self._active = active
        self.module.train(active)
        for parameter in self._unique:
            parameter.requires_grad_(active)

    def backward(self, loss: Tensor) -> None:
        self._passes += 1
        if self.world.size == 1:
            loss.backward()
            return
        if self._passes == 1:
            self._averaging.begin()
        if self._passes == self.passes:
            self._averaging.expect()
        loss.backward()
        if self._passes == self.passes:
            self._averaging.send_rest()

    @cached_property
    def _averaging(self) -> Averaging:
        return Averaging(self._unique, self.world)

    def check_reach(self) -> None:
        self._reach.check(self.world)

    def gradient_norm(self) -> Tensor:
        """The global norm of the gradients, averaged over the ranks, before clipping.

        A parameter without a gradient gets gradient 0, so that its moments and weight decay are updated too, as with
        DeepSpeed.
        """
        assert self._passes == self.passes
        if self.world.size > 1:
            self._averaging.wait()
        for p in self._unique:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return torch.nn.utils.get_total_norm([p.grad for p in self._unique if p.grad is not None])

    def step(self, lr: float, norm: Tensor) -> None:
        """Clip the gradients, update the weights, clear the gradients."""
        if self.spec.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._unique, self.spec.clip, norm)
        self.optimizers.set_lr(lr)
        self.optimizers.step()
        self._passes = 0

    def masters(self) -> dict[str, Tensor]:
        return dict(self._parameters)

    def read(self, group: GroupReader) -> dict[str, Tensor]:
        return {key: group[key] for key in self._parameters}

    def load_masters(self, group: GroupReader) -> None:
        """Nothing to do: they are the weights of the network, which are loaded whole."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        yield

    def parts(self, own: Mapping[str, Tensor]) -> RankParts:
        return share_of({**own_state(self.module), **own}, self.world.rank, self.world.size)

    def state(self) -> RankParts:
        states = {key: self.optimizers.state(p) for key, p in self._parameters.items()}
        found = {f"{key}/{name}": tensor for key, each in states.items() for name, tensor in each.items()}
        return share_of(found, self.world.rank, self.world.size)

    def load_state(self, group: GroupReader) -> None:
        self._refuse_unknown(group)
        if not group:
            return
        self._reach.close()  # the turns before the checkpoint are not known any more
        states: dict[nn.Parameter, dict[str, Tensor]] = {}
        for full, tensor in group.items():
            key, _, name = full.rpartition("/")
            states.setdefault(self._parameters[key], {})[name] = tensor
        self.optimizers.load(states)

    def close(self) -> None:
        """Nothing to free."""

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        for full in names:
            if (key := full.rpartition("/")[0]) not in self._parameters:
                raise RunError(f"the optimizer state of network '{self.name}' has '{key}', but the network does not")

    def live(self) -> dict[str, list[Tensor]]:
        return {
            "parameters": [p for p in self.module.parameters() if not is_shared(p)],
            "gradients": [p.grad for p in self._unique if p.grad is not None],
            "optimizer": [t for p in self._unique for t in self.optimizers.state(p).values()],
        }


class Plain:
    """Every process has all networks whole. Implements `sharding.Sharding`."""

    record: Mapping[str, str | int] = {"zero_stage": "none", "offload_optimizer": False}
    divides_trained = divides_frozen = False

    def wrap(
        self, name: str, role: Trained, spec: OptimizerSpec, world: World, device: torch.device, slices: list[Rows]
    ) -> PlainTrainable:
        return PlainTrainable(name, role, spec, world, len(slices))

    def divide(self, network: nn.Module, device: torch.device, world: World) -> None:
        raise AssertionError("nothing is divided")

    def held(self, sizes: Sizes, still: Sizes, procs: int) -> Held:
        total = {name: sum(each) for name, each in sizes.items()}
        parameters = sum(total.values()) + sum(sum(each) for each in still.values())
        gradients = max(total.values())  # only one network has gradients at a time
        return Held(parameters, gradients, 2 * sum(total.values()), total)


PLAIN = Plain()
