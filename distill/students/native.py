"""Students that start from the network of a latent-space pipeline, and keep its class, its prediction and its schedule.

What makes them students of the linear path happens around the network, in `LinearCall`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.flow.interpolants import linear
from distill.networks.acceleration import AccelerationStudent
from distill.networks.architectures import drawn
from distill.networks.critic import Critic
from distill.networks.experts import Experts
from distill.networks.flow_map import FlowMapStudent
from distill.networks.two_times import TwoNetworks, TwoTimes
from distill.networks.velocity import VelocityStudent
from distill.protocols import Cond
from distill.teachers.architectures import class_of, convention_of, known
from distill.teachers.convention import Convention
from distill.teachers.loaded import LoadedTeacher
from distill.teachers.network_field import EdmField, InDtype, LinearCall, NetworkField, linear_call

NativeStudent = VelocityStudent | FlowMapStudent | AccelerationStudent
FIRST, SECOND = "transformer", "transformer_2"  # attributes of Experts


def is_native(network: nn.Module | None) -> bool:
    """Whether it is the network of a latent-space pipeline, or one of the networks that are made from it here."""
    return network is not None and convention_of(base_of(network)) is not None


def base_of(network: nn.Module) -> nn.Module:
    """The network that takes x_t and one time."""
    if isinstance(network, TwoTimes):
        return network.network
    return network.velocity if isinstance(network, TwoNetworks) else network


def teacher_on_linear_path(teacher: LoadedTeacher) -> LoadedTeacher:
    """The teacher with its network called on the linear path, finite at both ends."""
    assert isinstance(teacher.field, EdmField | NetworkField)
    call = linear_call(teacher.field)
    field = NetworkField(teacher.field.network, linear(), "velocity", 1.0, call=call)
    return replace(teacher, field=field)


def call_of(source: LoadedTeacher | NativeStudent) -> LinearCall:
    """How a copy in float32 of the network of a teacher, or of a student made here, is called on the linear path."""
    if isinstance(source, LoadedTeacher):
        assert isinstance(source.field, EdmField | NetworkField)
        own = linear_call(source.field)  # may cast to the data type of the teacher's weights
        return replace(own, call=own.call.call) if isinstance(own.call, InDtype) else own
    found = source.call
    assert isinstance(found, LinearCall | TwoTimesCall | TwoNetworksCall)
    return found if isinstance(found, LinearCall) else found.call


def copied(network: nn.Module, dropout: float | None) -> nn.Module:
    """A copy in float32, in which all is trained except for what the class freezes and what has no effect.

    dropout: probability in all its layers of dropout; None: as in the network.
    """
    found = _without_unused(_built_again(network).train())
    if dropout is not None:
        layers = [each for each in found.modules() if isinstance(each, nn.Dropout)]
        if not layers:
            raise InputError(
                f"dropout: {type(base_of(network)).__name__} is a network without dropout, so this has no effect; "
                "remove it"
            )
        for layer in layers:
            layer.p = dropout
    return found


@dataclass(frozen=True)
class TwoTimesCall:
    """How a FlowMapStudent calls a TwoTimes network."""

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


def flow_map(network: nn.Module, call: LinearCall, seed: int) -> FlowMapStudent:
    """A flow map: of a network that knows two times, or made from a velocity network. Then it is at first the velocity,
    for every s.
    """
    if isinstance(network, TwoTimes):
        return FlowMapStudent(network, TwoTimesCall(call))
    convention = convention_for(network)
    layers = [prefix + name for prefix, part in parts_of(network) for name in convention.time_layers(part)]
    with drawn(seed, "second time"):
        found = TwoTimes(network, layers, convention.time_width(_config(network)))
    found.gap.to(next(network.parameters()).device)
    return FlowMapStudent(found, TwoTimesCall(call))


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
    weights = convention.widened(config, network.state_dict(), grown.state_dict())
    grown.load_state_dict({name: each.clone() for name, each in weights.items()}, assign=True)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Dropout):
            grown.get_submodule(name).p = layer.p  # a stage may set another one than the config
    convention.settled(grown)
    return grown.to(next(network.parameters()).device).train(network.training)


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
        case TwoTimes():
            with drawn(0, "second time"):  # all random weights are replaced
                again = TwoTimes(_built_again(network.network), network.layers, network.gap[0].out_features)
            weights = {name: each.clone() for name, each in network.gap.state_dict().items()}
            again.gap.load_state_dict(weights, assign=True)
            return again
        case ModelMixin():
            with init_empty_weights(include_buffers=False):
                found = type(network).from_config(network.config)
            weights = {
                name: each.detach().to(torch.float32 if each.is_floating_point() else each.dtype, copy=True)
                for name, each in network.state_dict().items()
            }
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
