"""The architecture of our networks for vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill.core.errors import InputError
from distill.networks.acceleration_mlp import AccelerationMLP
from distill.networks.flow_map_mlp import FlowMapMLP
from distill.networks.policy_mlp import PolicyMLP
from distill.networks.velocity_mlp import VelocityMLP
from distill.protocols import Cond, Conditioning
from distill.teachers.architectures.unet import class_labels
from distill.teachers.network_field import call_unet
from distill.teachers.read import NetworkConfig, checked


@dataclass(frozen=True)
class Mlp:
    """Networks for vectors, with or without class labels. Implements `protocols.Architecture`."""

    classes: tuple[type[nn.Module], ...] = (VelocityMLP, FlowMapMLP, PolicyMLP, AccelerationMLP)
    title: str = "students for vectors"
    pipelines: tuple[str, ...] = ()
    prediction: str = "velocity"
    conditions: str = "class labels, or none"
    guidance: str = "second call, if there is a null class"

    def shape(self, content: dict[str, Any], path: Path) -> tuple[int, ...]:
        config = checked(NetworkConfig, content, path)
        if config.dim is None:
            raise InputError(f"{path} has no dim; copy or download it again")
        return (config.dim,)

    def conditioning(self, content: dict[str, Any], path: Path, null_class: int | None) -> Conditioning:
        return class_labels(checked(NetworkConfig, content, path), path, null_class)

    def layers(self, network: nn.Module) -> Sequence[str]:
        """The names layers.0, layers.1, ..."""
        return [name for name, _ in network.named_modules() if name.startswith("layers.")]

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return call_unet(network, x_t, time, cond)


ARCHITECTURE = Mlp()
