"""What the network of a published model costs, counted without its weights: on tensors that have no values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distill.networks import adapters
from distill.plans.facts import ModelFacts
from distill.protocols import Adapter, Cond
from distill.spec.model import LaunchSpec
from distill.students.lora_start import attention_layers
from distill.teachers.architectures import class_of, known
from distill.teachers.convention import Asked, Convention
from distill.training import blocks, memory
from distill.training.choice import choose_sharding
from distill.training.counting import CallCounts, count

NORMS = (nn.LayerNorm, nn.GroupNorm)  # autocast computes them in float32 on GPUs, and in bf16 on CPUs


@dataclass(frozen=True)
class Growth:
    """Bytes that grow with the number of samples."""

    fixed: int
    each: int
    """for each sample"""

    def of(self, samples: int) -> int:
        """The bytes for a number of samples."""
        return self.fixed + samples * self.each


@dataclass(frozen=True)
class NetworkCosts:
    """What a network costs. Operations are floating-point operations for one sample, see `counting.CallCounts`."""

    trained: Sequence[int]
    """elements of each trained parameter"""
    still: Sequence[int]
    """elements of each parameter that is not trained"""
    forward: int
    training: int
    activations: Growth
    """what autograd keeps; in bf16 also casts of the weights, which do not depend on the number of samples"""


def costs_of(
    model: ModelFacts, *, bf16: bool = True, recompute: bool = False, lora_rank: int | None = None
) -> NetworkCosts:
    """Count a call of the model's network at its default size, with prompts of the greatest length.

    bf16: under autocast, as it works on GPUs. recompute: the activations inside blocks are recomputed in the backward
    pass. lora_rank: only adapters of this rank are trained, in all linear layers of the attention.
    """
    convention = known()[model.network]
    assert isinstance(convention, Convention)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        network = class_of(model.network)(**model.config).train()
    if lora_rank is not None:  # PEFT cannot move tensors without values, so its own have some
        role = Adapter(network, lora_rank, float(lora_rank), tuple(attention_layers(network)))
        network = adapters.as_trained("student", role, 0).module
    with mode, _AllPresent():
        if recompute:
            blocks.recompute("", [network])
        return count_network(
            network, lambda samples: convention.call(network, *_inputs(convention, network, model, samples)), bf16=bf16
        )


def count_network(network: nn.Module, call: Callable[[int], Tensor], *, bf16: bool) -> NetworkCosts:
    """Count calls of a network for one sample and for two. call: number of samples -> the output.

    bf16: see `costs_of`. The network is changed for it.
    """

    def counted(samples: int) -> CallCounts:
        def under_autocast() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                return call(samples)

        return count(under_autocast)

    if bf16:
        for part in network.modules():
            if isinstance(part, NORMS):
                part.register_forward_pre_hook(_in_float32)
    one, two = counted(1), counted(2)
    each = two.activations - one.activations
    every = list(network.parameters())
    return NetworkCosts(
        [p.numel() for p in every if p.requires_grad],
        [p.numel() for p in every if not p.requires_grad],
        one.forward,
        one.training,
        Growth(one.activations - each, each),
    )


def process_memory(
    networks: Mapping[str, NetworkCosts],
    launch: LaunchSpec,
    samples: int,
    *,
    kept: Mapping[str, int] | None = None,
    copies: Sequence[str] = (),
    averages: int = 1,
    frozen: int = 0,
) -> dict[str, int]:
    """Bytes on the GPU of each process in training, by kind: those of `memory.predict`, "frozen" and "activations".

    networks: those that a recipe trains, by name; one of them is "student". samples: of a micro-batch. kept: how many
    calls of each network are in the same backward pass; None: one of the student. copies: for each target copy, the
    network that it copies. averages: of the student's weights. frozen: bytes of the weights of all other networks, like
    the teacher. If the networks are adapters of its weights, these must not be among the weights that stay still, too.
    """
    sharding, procs = choose_sharding(launch), launch.world_size
    sizes = {name: each.trained for name, each in networks.items()}
    still = {name: each.still for name, each in networks.items()}
    found = memory.predict(sizes, list(copies), averages, procs, sharding, still)
    if launch.offload_optimizer:
        found["optimizer"] = 0
    found["frozen"] = frozen // procs if sharding.divides_frozen else frozen
    calls = {"student": 1} if kept is None else kept
    found["activations"] = sum(times * networks[name].activations.of(samples) for name, times in calls.items())
    return found


def _in_float32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs of a norm in float32."""
    return tuple(each.float() for each in inputs)


def _inputs(convention: Convention, network: Any, model: ModelFacts, samples: int) -> tuple[Tensor, Tensor, Cond]:  # noqa: ANN401
    """What `Convention.call` takes: x_t, time, cond."""
    fields = convention.fields(network.config)
    cond = {
        name: torch.ones(samples, *(model.tokens if side is None else side for side in field.shape), dtype=field.dtype)
        for name, field in fields.items()
    }
    constants = convention.constants(network.config, Asked(tuple(model.pixels)))
    cond |= {name: each.expand(samples, *each.shape) for name, each in constants.items()}
    return torch.zeros(samples, *model.sample), torch.ones(samples), cond


class _AllPresent(TorchDispatchMode):
    """Selects all positions where a mask without values selects some of them."""

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        if operation is torch.ops.aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype == torch.bool:
            return args[0].flatten(0, args[1][0].dim() - 1).clone()
        return operation(*args, **(kwargs or {}))
