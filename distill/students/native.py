"""Students that start from the network of a latent-space pipeline, and keep its class, its prediction and its schedule.

What makes them students of the linear path happens around the network, in `LinearCall`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.core.field_types import GuidanceRange
from distill.flow.interpolants import linear
from distill.networks.acceleration import AccelerationStudent
from distill.networks.adapters import plain_weights
from distill.networks.architectures import drawn
from distill.networks.critic import Critic
from distill.networks.experts import Experts
from distill.networks.flow_map import SECOND_TIME_WAVES, FlowMapStudent
from distill.networks.guidance_input import GuidanceInput
from distill.networks.quantised import is_quantised
from distill.networks.second_time import SecondTime
from distill.networks.sharing import ADAPTER, BASE, adapted, as_base, copy_of, has_base, is_shared
from distill.networks.two_times import ToData, TwoNetworks, TwoTimes
from distill.networks.velocity import VelocityStudent
from distill.protocols import Cond
from distill.teachers.architectures import class_of, convention_of, known
from distill.teachers.convention import Convention
from distill.teachers.loaded import LoadedTeacher
from distill.teachers.network_field import EdmField, InDtype, LinearCall, NetworkField, linear_call

ONE_OUTPUT = (
    "this recipe trains a network with several outputs, which networks of latent-space pipelines cannot get yet; use "
    "another recipe, such as shortcut/progressive, or a new `network`"
)
NO_SCALE = "networks of latent-space pipelines get the guidance scale as an input beside the second time"
OTHER_RECIPE = "give one number as guidance_scale, or use another recipe, like shortcut/shortcut"
NativeStudent = VelocityStudent | FlowMapStudent | AccelerationStudent
WRAPPERS = TwoTimes | ToData | TwoNetworks  # what is made from a network of a latent-space pipeline here
FIRST, SECOND = "transformer", "transformer_2"  # attributes of Experts


def is_native(network: nn.Module | None) -> bool:
    """Whether it is the network of a latent-space pipeline, or one of the networks that are made from it here."""
    return network is not None and convention_of(base_of(network)) is not None


def base_of(network: nn.Module) -> nn.Module:
    """The network that takes x_t and one time."""
    if isinstance(network, TwoTimes | ToData):
        return network.network
    return network.velocity if isinstance(network, TwoNetworks) else network


def teacher_on_linear_path(teacher: LoadedTeacher) -> LoadedTeacher:
    """The teacher with its network called on the linear path, finite at both ends."""
    assert isinstance(teacher.field, EdmField | NetworkField)
    call = linear_call(teacher.field)
    field = NetworkField(teacher.field.network, linear(), "velocity", 1.0, call=call)
    return replace(teacher, field=field)


def call_of(source: LoadedTeacher | NativeStudent) -> LinearCall:
    """How the network of a teacher, or of a student made here, is called on the linear path."""
    if isinstance(source, LoadedTeacher):
        assert isinstance(source.field, EdmField | NetworkField)
        return linear_call(source.field)
    found = source.call
    assert isinstance(found, LinearCall | TwoTimesCall | TwoNetworksCall)
    return found if isinstance(found, LinearCall) else found.call


def in_float32(call: LinearCall) -> LinearCall:
    """How a copy in float32 of the network is called: without a cast to the data type of the teacher's weights."""
    return replace(call, call=call.call.call) if isinstance(call.call, InDtype) else call


def copied(network: nn.Module, dropout: float | None) -> nn.Module:
    """A copy in float32, to be trained as `trainable` says. InputError if weights of the network are quantised."""
    if is_quantised(network):
        raise InputError(
            "teacher.quantize: the teacher's weights are rounded, but a network that is trained in full starts from "
            "them; train adapters (lora) of every network that the recipe trains, or remove quantize"
        )
    return trainable(_built_again(network), dropout)


def trainable(network: nn.Module, dropout: float | None) -> nn.Module:
    """A new network, in which all is trained except for what its class freezes and what has no effect.

    dropout: probability in all its layers of dropout; None: as in the network.
    """
    return _with_dropout(_without_unused(network.train()), dropout)


def on_shared_base(network: nn.Module, dropout: float | None) -> nn.Module:
    """A copy that shares the frozen weights of the network, in their data type. Adapters and what is new are copied.

    dropout: as for `copied`.
    """
    as_base(network)
    found = copy_of(network).train()
    for name, parameter in found.named_parameters():
        parameter.requires_grad_(not is_shared(parameter) and ADAPTER not in name)
    return _with_dropout(found, dropout)


def without_adapters(network: nn.Module) -> nn.Module:
    """A copy that shares the frozen weights of the network, without the adapters that this may have."""
    as_base(network)
    found = copy_of(network)
    for name, part in adapted(found).items():
        found.set_submodule(name, part.get_submodule(BASE))
    return found


def unshared(module: nn.Module) -> None:
    """Gives the networks in a module, which share their weights with a teacher, own weights in float32, all trained."""
    for part in list(module.modules()):
        for name, network in part.named_children():
            if is_native(network) and has_base(network) and not isinstance(part, Experts | WRAPPERS):
                dropped = {key: each.p for key, each in network.named_modules() if isinstance(each, nn.Dropout)}
                setattr(part, name, again := copied(network, None))
                for key, probability in dropped.items():
                    again.get_submodule(key).p = probability
        match getattr(part, "call", None):
            case LinearCall() as call:
                part.call = in_float32(call)
            case TwoTimesCall() | TwoNetworksCall() as call:
                part.call = replace(call, call=in_float32(call.call))


def _with_dropout(network: nn.Module, dropout: float | None) -> nn.Module:
    if dropout is None:
        return network
    layers = [each for each in network.modules() if isinstance(each, nn.Dropout)]
    if not layers:
        raise InputError(
            f"dropout: {type(base_of(network)).__name__} is a network without dropout, so this has no effect; remove it"
        )
    for layer in layers:
        layer.p = dropout
    return network


@dataclass(frozen=True)
class TwoTimesCall:
    """How a FlowMapStudent calls a TwoTimes or ToData network."""

    call: LinearCall

    def __call__(self, network: nn.Module, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        found: Tensor = network(self.call, x_t, t, s, cond)
        return found


@dataclass(frozen=True)
class TwoNetworksCall:
    """How an AccelerationStudent calls TwoNetworks."""

    call: LinearCall

    def __call__(self, network: nn.Module, x_t: Tensor, t: Tensor, v: Tensor | None, cond: Cond) -> Tensor:
        assert isinstance(network, TwoNetworks)
        if v is None:
            return self.call(network.velocity, x_t, t, cond)
        return replace(self.call, call=_Joined(self.call, v))(network.acceleration, x_t, t, cond)


@dataclass(frozen=True)
class _Joined:
    """Calls a network with (x, v), joined along the channels, in place of x."""

    call: LinearCall
    v: Tensor

    def __call__(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return self.call.call(network, torch.cat([x_t, self.v], dim=1), time, cond)


def velocity(network: nn.Module, call: LinearCall) -> VelocityStudent:
    """The velocity field of a network."""
    return VelocityStudent(network, call)


def flow_map(
    network: nn.Module,
    call: LinearCall,
    seed: int,
    to_data: bool = False,
    waves: int = SECOND_TIME_WAVES,
    guidance_range: GuidanceRange | None = None,
) -> FlowMapStudent:
    """A flow map: of the network of one, or made from a velocity network. Then it is at first the velocity, for every
    s.

    to_data: it is only called with s = 0, so it gets no second time. waves: of a new second time. guidance_range: of
    the guidance scales that it takes beside the second time. InputError if it gets no second time.
    """
    if guidance_range is not None and to_data:
        raise InputError(f"{NO_SCALE}, and this recipe's students have none; {OTHER_RECIPE}")
    if isinstance(network, TwoTimes) or (isinstance(network, ToData) and to_data):
        if guidance_range is not None:
            _take_guidance(network.gap, guidance_range, seed)
        return FlowMapStudent(network, TwoTimesCall(call))
    network = base_of(network) if isinstance(network, ToData) else network
    if to_data:
        return FlowMapStudent(ToData(network), TwoTimesCall(call))
    convention = convention_for(network)
    layers = [prefix + name for prefix, part in parts_of(network) for name in convention.time_layers(part)]
    with drawn(seed, "second time"):
        scales = None if guidance_range is None else [*guidance_range]
        gap = SecondTime(convention.time_width(_config(network)), _in_pipeline(network, layers), waves, scales)
    found = TwoTimes(network, layers, gap)
    found.gap.to(next(network.parameters()).device)
    return FlowMapStudent(found, TwoTimesCall(call))


def _take_guidance(gap: SecondTime, guidance_range: GuidanceRange, seed: int) -> None:
    """Lets an embedding of the second time take the guidance scale too, on which it does not depend at first."""
    if gap.config.guidance_range is not None:
        return
    with drawn(seed, "guidance"):
        gap.guidance = GuidanceInput(guidance_range, gap.config.width).to(gap.hidden.weight)
    gap.register_to_config(guidance_range=[*guidance_range])


def acceleration(network: nn.Module, call: LinearCall) -> AccelerationStudent:
    """A velocity and its acceleration, of two networks, or made from a velocity network. Then the acceleration is at
    first the velocity, for every given velocity.
    """
    both = network if isinstance(network, TwoNetworks) else TwoNetworks(network, accelerated(network))
    return AccelerationStudent(_without_unused(both), TwoNetworksCall(call))


def accelerated(network: nn.Module) -> nn.Module:
    """A copy of the network with twice the input channels. The weights of the further ones are zero."""
    if isinstance(network, Experts):
        return Experts(accelerated(network.transformer), accelerated(network.transformer_2), network.boundary)
    convention = convention_for(network)
    # diffusers would ignore what is set here for options that the config did not have
    config = {name: each for name, each in network.config.items() if name != "_use_default_values"}
    with init_empty_weights(include_buffers=False):  # all weights are set below
        grown = type(network).from_config(convention.with_velocity(config))
    plain = {name.replace(f".{BASE}.", "."): each for name, each in network.state_dict().items()}
    plain = {name: each for name, each in plain.items() if ADAPTER not in name}
    weights = convention.widened(config, plain, grown.state_dict())
    same = _same(plain, weights) if has_base(network) else set()
    own = {name: each if name in same else each.clone() for name, each in weights.items()}
    grown.load_state_dict(own, assign=True)
    if same:
        _share(grown, network, same)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Dropout):
            grown.get_submodule(name).p = layer.p  # a stage may set another one than the config
    convention.settled(grown)
    return grown.to(next(network.parameters()).device).train(network.training)


def _same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """The names of the weights in layers of which no weight has changed."""
    changed = {name.rpartition(".")[0] for name, each in after.items() if each is not before.get(name)}
    return {name for name in after if name.rpartition(".")[0] not in changed}


def _share(grown: nn.Module, network: nn.Module, same: Collection[str]) -> None:
    """Makes the weights `same` of a network with more input channels those of `network`, with its adapters.

    The other weights are trained, in float32.
    """
    for name, parameter in network.named_parameters(remove_duplicate=False):
        plain = name.replace(f".{BASE}.", ".")
        owner, _, own = plain.rpartition(".")
        if plain in same:
            setattr(grown.get_submodule(owner), own, parameter)
    for name, buffer in network.named_buffers():
        owner, _, own = name.rpartition(".")
        if (made := dict(grown.named_buffers()).get(name)) is not None and made.shape == buffer.shape:
            setattr(grown.get_submodule(owner), own, buffer)
    for name, part in adapted(network).items():
        if f"{name}.weight" not in same:
            raise InputError(
                f"the layer {name} has an adapter, and an acceleration has a wider layer in its place; start from a "
                "network without an adapter there"
            )
        grown.set_submodule(name, copy_of(part))
    new = {name: each for name, each in grown.named_parameters() if not is_shared(each) and ADAPTER not in name}
    for owner in {name.rpartition(".")[0]: None for name in new}:
        part = grown.get_submodule(owner)
        dtype = next(part.parameters(recurse=False)).dtype  # a class may keep other layers in float32
        if dtype != torch.float32:
            part.float().register_forward_pre_hook(_cast_inputs)
            part.register_forward_hook(partial(_cast_output, dtype))
        part.requires_grad_(True)


def _cast_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.float() for each in inputs)


def _cast_output(dtype: torch.dtype, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(dtype)


def critic(network: nn.Module, call: LinearCall, seed: int) -> Critic:
    """A velocity and one logit per sample, from the features in the middle of the network."""
    convention = convention_for(network)
    layers = [prefix + convention.critic_layer(part) for prefix, part in parts_of(network)]
    return Critic(
        VelocityStudent(network, call), seed, layers, convention.critic_width(_config(network)), convention.of_image
    )


def convention_for(network: nn.Module) -> Convention:
    found = convention_of(network)
    assert found is not None
    return found


def _in_pipeline(network: nn.Module, layers: Sequence[str]) -> list[str]:
    """Names of modules of a network as COMPONENT.MODULE of its pipeline."""
    prefix = "" if isinstance(network, Experts) else f"{convention_for(network).folder}."
    return [prefix + name for name in layers]


def parts_of(network: nn.Module) -> Sequence[tuple[str, nn.Module]]:
    """The networks by the prefix of the names of their modules: one, or two."""
    if isinstance(network, Experts):
        return [(f"{FIRST}.", network.transformer), (f"{SECOND}.", network.transformer_2)]
    return [("", network)]


def by_name(name: str) -> type[ModelMixin] | None:
    """The network class of this name; None if it is not one of a latent-space pipeline."""
    return class_of(name) if isinstance(known().get(name), Convention) else None


def _built_again(network: nn.Module) -> nn.Module:
    """A copy in float32, built from the config. What its class freezes is frozen, and nothing else.

    All parameters of a loaded network are frozen, and it may have tables of positions in 16 bits that are not stored.
    """
    match network:
        case Experts():
            return Experts(_built_again(network.transformer), _built_again(network.transformer_2), network.boundary)
        case TwoNetworks():
            return TwoNetworks(_built_again(network.velocity), _built_again(network.acceleration))
        case ToData():
            return ToData(_built_again(network.network))
        case TwoTimes():
            gap = copy_of(network.gap).float().requires_grad_(True)
            return TwoTimes(_built_again(network.network), network.layers, gap)
        case ModelMixin():
            with init_empty_weights(include_buffers=False):
                found = type(network).from_config(network.config)
            weights, stored = plain_weights(network), {each.data_ptr() for each in network.state_dict().values()}
            for name, each in weights.items():  # a weight into which an adapter was merged is a copy already
                dtype = torch.float32 if each.is_floating_point() else each.dtype
                weights[name] = each.detach().to(dtype, copy=each.data_ptr() in stored)
            found.load_state_dict(weights, strict=True, assign=True)
            convention_for(found).settled(found)
            return found.to(network.device)
    raise AssertionError(f"{type(network).__name__} is not a network of a latent-space pipeline")


def _without_unused(network: nn.Module) -> nn.Module:
    """The network, in which parameters without effect on the output are frozen."""
    for part in network.modules():
        found = known().get(type(part).__name__)
        if isinstance(found, Convention):
            for name in found.unused(part):
                part.get_submodule(name).requires_grad_(False)
    return network


def _config(network: nn.Module) -> dict[str, object]:
    return dict((network.transformer if isinstance(network, Experts) else network).config)
