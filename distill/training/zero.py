"""Trained networks that DeepSpeed divides among the ranks: ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054).

Stage 0 divides nothing, stage 1 the optimizer's moments, stage 2 also the gradients, stage 3 also the weights. State
dicts that leave this module are whole, in fp32 and by parameter name, as those of a network that is trained on one
process. So a checkpoint can be loaded with any number of ranks and any stage.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, distributed, nn

from distill.core.errors import RunError
from distill.flow.draws import Rows
from distill.networks.sharing import has_base, is_shared, own_state
from distill.protocols import Trained
from distill.spec.model import OptimizerSpec
from distill.training.checkpoint_files import GroupReader, PieceMeta
from distill.training.parts import RankParts, share_of
from distill.training.plain import PLAIN, PlainTrainable
from distill.training.sharding import Held, Sizes, Trainable
from distill.training.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # most elements that are gathered, or divided, at once
PERSISTENT = 100_000  # DeepSpeed's default in stage 3: parameters of at most so many elements stay whole
QUIET = {"steps_per_print": 10**9, "timers": {"throughput": {"enabled": False}}}  # both would wait for the GPU


@dataclass(frozen=True)
class ParameterPart:
    """This rank's part of a parameter: its elements [start, start + numel) are [at, at + numel) of a flat tensor."""

    flat: int  # number of the flat tensor
    at: int
    start: int
    numel: int

    def of(self, flats: list[Tensor]) -> Tensor:
        return flats[self.flat].view(-1).narrow(0, self.at, self.numel)


class OfTrained(nn.Module):
    """A module as DeepSpeed sees it: with the parameters that are trained alone.

    DeepSpeed would convert the others to float32 and send them to all ranks. They belong to several networks.
    """

    def __init__(self, module: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)
        self._called = (module,)  # in a tuple, so that it is no part of this module

    def forward(self, *inputs: object) -> object:
        return self._called[0](*inputs)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """What recipes read from the module, such as its interpolant."""
        if name in ("trained", "_called"):
            return super().__getattr__(name)
        return getattr(self._called[0], name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *dir(self._called[0])]


class ZeroTrainable(PlainTrainable):
    """The network of `role` in a DeepSpeed engine. Implements `sharding.Trainable`.

    In stage 3 the network may be on the CPU: it is moved to the device part by part while it is divided.
    """

    def __init__(
        self,
        name: str,
        role: Trained,
        spec: OptimizerSpec,
        world: World,
        *,
        device: torch.device,
        zero: "Zero",
        slices: list[Rows],
    ) -> None:
        super().__init__(name, role, spec, world, len(slices))
        assert zero.stage is not None
        self.stage = zero.stage
        (self._optimizer,) = self.optimizers.each  # AdamW: the checks of a spec refuse others
        self.shapes = {key: p.shape for key, p in self._parameters.items()}  # stage 3 makes the parameters empty
        config = _config(sum(self.sizes), spec, zero, slices)
        if self.stage == 3:
            _divide(self.module, device, config)
        called = OfTrained(self.module, self._unique) if has_base(self.module) else self.module
        self.engine = _initialize(called, config, world, self._optimizer)
        self._flats, self._parts = self._layout()

    @property
    def callable(self) -> nn.Module:
        return self.engine

    def backward(self, loss: Tensor) -> None:
        if self._passes:
            # DeepSpeed expects step() after every micro-batch; it updates the weights only after the last one.
            self.engine.step()
        self._passes += 1
        self.engine.backward(loss, scale_wrt_gas=False)

    def gradient_norm(self) -> Tensor:
        assert self._passes == self.passes
        optimizer = self.engine.optimizer
        if self.stage == 0:
            return torch.nn.utils.get_total_norm([p.grad for p in self._unique if p.grad is not None])
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            return combine_grad_norm_groups(optimizer._get_norm_groups()).float()  # infinite if a group says -1
        return optimizer.scaled_global_norm().float()

    def step(self, lr: float, norm: Tensor) -> None:
        self.optimizers.set_lr(lr)
        self.engine.step()
        if self.stage == 3:
            # Otherwise a parameter that the next turn does not reach would be updated with these gradients again.
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()
        self._passes = 0

    def masters(self) -> dict[str, Tensor]:
        """This rank's parts of the fp32 weights, as flat tensors by name."""
        return {key: part.of(self._flats) for key, part in self._parts.items()}

    def read(self, group: GroupReader) -> dict[str, Tensor]:
        return {key: group.part(key, part.start, part.numel) for key, part in self._parts.items()}

    def load_masters(self, group: GroupReader) -> None:
        if self.stage < 3:
            return  # they are copies of the whole weights
        for key, shape in self.shapes.items():
            if group.shapes[key] != shape:
                raise RunError(
                    f"network '{self.name}' does not fit the checkpoint: {key} has shape {list(shape)}, and "
                    f"{list(group.shapes[key])} there"
                )
        optimizer = self.engine.optimizer
        optimizer.checkpoint_event_prologue()  # divides the parameters that stay whole, too
        for key, tensor in self.read(group).items():
            self._parts[key].of(self._flats).data.copy_(tensor)
        for number in range(len(self._flats)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)  # copies them to the parameters
        optimizer.checkpoint_event_epilogue()  # gathers them again

    @contextmanager
    def whole(self) -> Iterator[None]:
        with _deepspeed().zero.GatheredParameters(list(self.module.parameters()), enabled=self.stage == 3):
            yield

    def live(self) -> dict[str, list[Tensor]]:
        if self.stage == 0:
            return super().live()
        masters = self._flats
        found = {"optimizer": [*masters, *(t for flat in masters for t in self._moments(flat).values())]}
        if self.stage == 3:
            owned = [p.ds_tensor for p in self.module.parameters()]
            return {**found, "parameters": [*self.module.parameters(), *owned], "gradients": self._divided_gradients()}
        parameters = [p for p in self.module.parameters() if not is_shared(p)]
        return {**found, "parameters": parameters, "gradients": self._divided_gradients()}

    def _divided_gradients(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        found = [t for group in optimizer.averaged_gradients.values() for t in group or ()]
        found += [flat.grad for flat in self._flats if flat.grad is not None]
        return [*found, optimizer.grad_partitions_flat_buffer] if self.stage == 3 else found

    def parts(self, own: Mapping[str, Tensor]) -> RankParts:
        return self._unmoved() | self._divided("", own)

    def _unmoved(self) -> RankParts:
        """This rank's share of what is not trained. In stage 3, each rank takes whole tensors, which all gather."""
        own = {key: tensor for key, tensor in own_state(self.module).items() if key not in self.shapes}
        if self.stage < 3:
            return share_of(own, self.world.rank, self.world.size)
        parameters, found = dict(self.module.named_parameters(remove_duplicate=False)), {}
        for number, (key, tensor) in enumerate(own.items()):
            frozen = [parameters[key]] if key in parameters else []  # one by one: all may not fit on a device
            with _deepspeed().zero.GatheredParameters(frozen):
                if number % self.world.size == self.world.rank:
                    found[key] = (*frozen, tensor)[0].detach().cpu().clone()
        return RankParts(found)

    def _divided(self, moment: str, own: Mapping[str, Tensor]) -> RankParts:
        """This rank's parts of tensors that are divided like `masters`. moment: what to add to their names."""
        if self.stage == 0:
            whole = {key + moment: tensor.view(self.shapes[key]) for key, tensor in own.items()}
            return share_of(whole, self.world.rank, self.world.size)
        tensors: dict[str, Tensor] = {}
        pieces: dict[str, PieceMeta] = {}
        for key, tensor in own.items():
            shape = self.shapes[key]
            if tensor.numel() == shape.numel():
                tensors[key + moment] = tensor.view(shape)
            else:
                tensors[key + moment] = tensor
                pieces[key + moment] = PieceMeta(start=self._parts[key].start, shape=list(shape))
        return RankParts(tensors, pieces)

    def state(self) -> RankParts:
        moments = [self._moments(flat) for flat in self._keys()]
        if not all(moments):
            return RankParts()  # before the first step
        found = RankParts()
        for name in MOMENTS:
            flats = [moment[name] for moment in moments]
            found |= self._divided(f"/{name}", {key: part.of(flats) for key, part in self._parts.items()})
        if self.world.first:
            found |= RankParts({f"{key}/step": moments[0]["step"].cpu().clone() for key in self.shapes})
        return found

    def load_state(self, group: GroupReader) -> None:
        self._refuse_unknown(group)
        if not group:
            return
        self._reach.close()
        steps = torch.stack([group[name] for name in group if name.endswith("/step")])
        for flat in self._keys():
            zeros = {name: torch.zeros_like(flat) for name in MOMENTS}
            self._moments(flat).update(step=steps.max().to(flat.device, copy=True), **zeros)
        for name in MOMENTS:
            flats = [self._moments(flat)[name] for flat in self._keys()]
            for key, part in self._parts.items():
                if (full := f"{key}/{name}") in group:
                    part.of(flats).copy_(group.part(full, part.start, part.numel))

    def close(self) -> None:
        self.engine.destroy()

    def _moments(self, flat: Tensor) -> dict[str, Any]:
        return self._optimizer.state[flat]

    def _keys(self) -> list[Tensor]:
        """The tensors for which the optimizer has moments."""
        return self._flats if self.stage else list(self._unique)

    def _layout(self) -> tuple[list[Tensor], dict[str, ParameterPart]]:
        optimizer, parts = self.engine.optimizer, {}
        if self.stage == 0:
            numbers = {p: i for i, p in enumerate(self._unique)}
            parts = {key: ParameterPart(numbers[p], 0, 0, p.numel()) for key, p in self._parameters.items()}
            return [p.data for p in self._unique], parts
        if self.stage < 3:
            for key, p in self._parameters.items():
                if (found := p._hp_mapping) is not None:
                    ours, whole = found.hp_fragment_address, found.lp_fragment_address
                    parts[key] = ParameterPart(found.param_group_index, ours.start, whole.start, ours.numel)
            return list(optimizer.single_partition_of_fp32_groups), parts
        for key, p in self._parameters.items():
            flat, at, share = optimizer.grad_position[optimizer.get_param_id(p)]
            start = self.world.rank * share
            if (numel := min(share, p.ds_numel - start)) > 0:  # the last shares may be padding only
                parts[key] = ParameterPart(flat, at, start, numel)
        return list(optimizer.fp32_partitioned_groups_flat), parts


@dataclass(frozen=True)
class Zero:
    """Division of networks by DeepSpeed. Implements `sharding.Sharding`."""

    stage: int | None
    """ZeRO stage of the trained networks; None: they are trained without DeepSpeed"""
    frozen: bool = False
    """whether the weights of frozen networks, including the teacher, are divided"""
    persistence_threshold: int | None = None
    """if weights are divided, parameters with at most this many elements stay whole; None: DeepSpeed's default"""
    offload_optimizer: bool = False
    """keep master weights and moments in CPU memory and update them there, by torch's AdamW (nothing is compiled)"""

    @property
    def record(self) -> dict[str, str | int]:
        return {
            "zero_stage": "none" if self.stage is None else self.stage,
            "offload_optimizer": self.offload_optimizer,
        }

    @property
    def divides_trained(self) -> bool:
        return self.stage == 3

    @property
    def divides_frozen(self) -> bool:
        return self.frozen

    def wrap(
        self, name: str, role: Trained, spec: OptimizerSpec, world: World, device: torch.device, slices: list[Rows]
    ) -> Trainable:
        if self.stage is None:
            return PlainTrainable(name, role, spec, world, len(slices))
        return ZeroTrainable(name, role, spec, world, device=device, zero=self, slices=slices)

    def divide(self, network: nn.Module, device: torch.device, world: World) -> None:
        """Divide a frozen network. A call gathers its weights layer by layer, and gradients can flow to its input.

        All ranks must call the network together.
        """
        numel = sum(p.numel() for p in network.parameters())
        division = {"stage": 3, **_division(numel), "stage3_max_reuse_distance": 0}
        if self.persistence_threshold is not None:
            division["stage3_param_persistence_threshold"] = self.persistence_threshold
        config = {"train_micro_batch_size_per_gpu": 1, **QUIET, "zero_optimization": division}
        _divide(network, device, config)
        _initialize(network, config, world)

    def held(self, sizes: Sizes, still: Sizes, procs: int) -> Held:
        if not self.stage:
            return PLAIN.held(sizes, still, procs)
        own = {name: sum(math.ceil(size / procs) for size in each) for name, each in sizes.items()}
        gradients = sum(own.values()) if self.stage == 3 else max(own.values())  # stage 3 never frees them
        every = [size for each in (*sizes.values(), *still.values()) for size in each]
        parameters = sum(every)
        if self.stage == 3 and procs > 1:  # one process has all of it anyway
            least = PERSISTENT if self.persistence_threshold is None else self.persistence_threshold
            parameters = sum(math.ceil(size / procs) for size in every) + sum(size for size in every if size <= least)
        return Held(parameters, gradients, 3 * sum(own.values()), own)  # master weights and two moments, divided


def _divide(network: nn.Module, device: torch.device, config: dict[str, Any]) -> None:
    _deepspeed().zero.Init(module=network, config_dict_or_path=config)
    for buffer in network.buffers():
        buffer.data = buffer.to(device)


def _division(numel: int) -> dict[str, Any]:
    # By default, DeepSpeed's buffers take 2 GB even for a small network. Its memory-efficient linear layer would also
    # replace torch's in all networks of the process, e.g. the teacher. torch's layer keeps gathered weights for the
    # backward pass; launch.activation_checkpointing avoids that.
    bucket = min(numel + numel % 2, BUCKET)  # DeepSpeed refuses odd sizes
    return {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket, "memory_efficient_linear": False}


def _config(numel: int, spec: OptimizerSpec, zero: "Zero", slices: list[Rows]) -> dict[str, Any]:
    division = {"stage": zero.stage, **_division(numel)}
    if zero.persistence_threshold is not None:
        division["stage3_param_persistence_threshold"] = zero.persistence_threshold
    if zero.offload_optimizer:
        division["offload_optimizer"] = {"device": "cpu"}
    if zero.stage in (1, 2):
        division["overlap_comm"] = True  # send gradients while the backward pass computes others; default in stage 3
    return {
        "train_micro_batch_size_per_gpu": slices[0].stop - slices[0].start,
        "gradient_accumulation_steps": len(slices),
        "gradient_clipping": spec.clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": division,
        **QUIET,
    }


def _initialize(
    module: nn.Module, config: dict[str, Any], world: World, optimizer: torch.optim.Optimizer | None = None
) -> Any:  # noqa: ANN401
    from deepspeed.utils import groups

    deepspeed = _deepspeed()
    if groups._WORLD_GROUP is None:  # DeepSpeed's own group would have a timeout of half an hour
        groups._WORLD_GROUP = distributed.new_group(timeout=world.timeout)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]


@cache
def _deepspeed() -> ModuleType:
    """The deepspeed module. It is imported only if it is used, because that takes seconds."""
    # DeepSpeed calls deprecated functions of torch; the warning would be shown at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed

    # The operator for memory shared by the ranks of a host would be compiled at the start, and is not used here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Only the training loop and the recipe decide on autocast. DeepSpeed would set its own in every call of a network:
    # derivatives that turn autocast off would be computed in bf16, and casts made without gradients would be cached.
    engine = vars(deepspeed.runtime.engine)
    assert "autocast_if_enabled" in engine, f"DeepSpeed {deepspeed.__version__} decides on autocast somewhere else"
    engine["autocast_if_enabled"] = lambda _: nullcontext()
    return deepspeed
