"""Students that start from the network of a latent-space pipeline, and keep its class, its prediction and its schedule.

What makes them students of the linear path happens around the network, in `LinearCall`.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
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
from distill.teachers.network_field import EdmField, LinearCall, NetworkField, linear_call

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
    """How the network of a teacher, or of a student made here, is called on the linear path."""
    if isinstance(source, LoadedTeacher):
        assert isinstance(source.field, EdmField | NetworkField)
        return linear_call(source.field)
    found = source.call
    assert isinstance(found, LinearCall | TwoTimesCall | TwoNetworksCall)
    return found if isinstance(found, LinearCall) else found.call


def copied(network: nn.Module, dropout: float | None) -> nn.Module:
    """A trainable copy in float32. dropout: probability in all its layers of dropout; None: as in the network."""
    found = _without_unused(deepcopy(network).float().requires_grad_(True).train())
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
    convention, config = convention_for(network), dict(network.config)
    with drawn(0, "acceleration"):  # all random weights are replaced
        grown = type(network).from_config(convention.with_velocity(config))
    grown.load_state_dict(convention.widened(config, network.state_dict(), grown.state_dict()))
    convention.settled(grown)
    return grown.to(next(network.parameters()).device).train(network.training)


def critic(network: nn.Module, call: LinearCall, seed: int) -> Critic:
    """A velocity and one logit per sample, from the features in the middle of the network."""
    convention = convention_for(network)
    layers = [prefix + convention.critic_layer(part) for prefix, part in parts_of(network)]
    width, part = convention.critic_width(_config(network)), convention.image_output
    return Critic(VelocityStudent(network, call), seed, layers, width, part)


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
