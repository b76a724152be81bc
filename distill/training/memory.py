"""The memory of a rank in training: predicted from the shapes of parameters, and counted in its live tensors.

Four kinds are predicted: parameters, gradients, optimizer (with master weights) and EMA, just before an optimizer step.
During the last backward pass there is more: ZeRO stage 1 has not divided the gradients yet, stages 2 and 3 have a
bucket of gradients to send, and stage 3 also has gathered weights. What depends on more than shapes is only counted:
activations, all other tensors (e.g. the teacher's), and the memory of the process as the system reports it.
"""

import gc
import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from distill.training.roles import Roles
from distill.training.sharding import Sharding, Sizes

KINDS = ("parameters", "gradients", "optimizer", "ema")
FLOAT = 4  # bytes of a float32


def predict(
    sizes: Sizes,
    copies: list[str],
    averages: int,
    procs: int,
    sharding: Sharding,
    still: Sizes | None = None,
    moments: int | None = None,
) -> dict[str, int]:
    """Predicted bytes of a rank by kind.

    sizes: elements of the trained parameters, by network. still: the same of the other parameters.
    moments: bytes of the state of optimizers other than AdamW, which are not divided.
    copies: for each target copy, the network that it copies. averages: number of averages of the student's weights.
    """
    others = still or {}
    held = sharding.held(sizes, others, procs)
    elements = {
        "parameters": held.parameters + sum(sum(sizes[name]) + sum(others.get(name, ())) for name in copies),
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "ema": averages * held.masters["student"],
    }
    found = {kind: FLOAT * count for kind, count in elements.items()}
    return found if moments is None else found | {"optimizer": moments}


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The storages of these tensors, each once: size in bytes by address."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


@dataclass
class Activations:
    """Context that counts the bytes that autograd keeps for the backward pass, without parameters.

    It also counts tensors without values (fake or meta), whose data has no address.
    """

    peak: int = 0
    now: int = 0
    _held: dict[int, int] = field(default_factory=dict)  # number of kept tensors by the identity of their storage
    _hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> Self:
        self._hooks = saved_tensors_hooks(self._pack, lambda kept: kept.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop counting."""
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
            self._hooks = None

    def _pack(self, tensor: Tensor) -> "_Kept":
        return _Kept(self, tensor)

    def add(self, tensor: Tensor, count: int) -> None:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return
        storage = tensor.untyped_storage()
        before = self._held.get(storage._cdata, 0)
        self._held[storage._cdata] = before + count
        if not before or not before + count:
            self.now += count * storage.nbytes()
        self.peak = max(self.peak, self.now)


class _Kept:
    def __init__(self, counted: Activations, tensor: Tensor) -> None:
        self.counted, self.tensor = counted, tensor
        counted.add(tensor, 1)

    def __del__(self) -> None:
        self.counted.add(self.tensor, -1)


class Probe:
    """Counts the live tensors before each optimizer step of a training, and keeps the largest count."""

    def __init__(self, sharding: Sharding, procs: int) -> None:
        self.sharding, self.procs, self.activations = sharding, procs, Activations()
        self.predicted: dict[str, int] = {}
        self.counted: dict[str, int] = {}
        self.other = self.saving = 0

    def __call__(self, roles: Roles) -> None:
        self.saving = roles.checkpoint_bytes() // roles.world.size
        live = roles.live()
        live["parameters"] = [*live["parameters"], *live.pop("copies")]
        found = {kind: storages(live[kind]) for kind in KINDS}
        counted = {kind: sum(each.values()) for kind, each in found.items()}
        if sum(counted.values()) <= sum(self.counted.values()):
            return
        sizes = {name: trainable.sizes for name, trainable in roles.trainables.items()}
        still = {name: trainable.still for name, trainable in roles.trainables.items()}
        copies = [copy.of for copy in roles.copies.values()]
        averages, moments = len(roles.ema.averages), roles.moments
        self.predicted = predict(sizes, copies, averages, self.procs, self.sharding, still, moments)
        everything = storages(thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
        known = set().union(*found.values())
        self.counted, self.other = counted, sum(size for at, size in everything.items() if at not in known)

    def report(self, rank: int) -> dict[str, object]:
        """All counts in bytes, as JSON.

        `device` is the peak that torch allocated on the GPU, null without one. `process` is the peak memory of the
        process. `saving` is the approximate host memory for the copy of its part of a checkpoint, from the first save
        on.
        """
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "rank": rank,
            "predicted": self.predicted,
            "counted": self.counted,
            "activations": self.activations.peak,
            "other": self.other,
            "saving": self.saving,
            "process": usage if sys.platform == "darwin" else 1024 * usage,
            "device": torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None,
        }
