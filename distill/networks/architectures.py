"""Builds networks with fresh weights from a spec. The same spec and seed always give bitwise the same weights."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import ModelMixin, UNet2DModel
from torch import nn

from distill.core.errors import InputError
from distill.core.field_types import GuidanceRange
from distill.core.space import human
from distill.flow.draws import key, sample_noise
from distill.networks.acceleration_mlp import AccelerationMLP
from distill.networks.acceleration_unet import AccelerationUNet2DModel
from distill.networks.edm_unet import DhariwalUNet2DModel, SongUNet2DModel
from distill.networks.flow_map import SECOND_TIME_WAVES
from distill.networks.flow_map_edm import FlowMapEdmUNet2DModel
from distill.networks.flow_map_mlp import FlowMapMLP
from distill.networks.flow_map_unet import FlowMapUNet2DModel
from distill.networks.policies import outputs_of
from distill.networks.policy_mlp import PolicyMLP
from distill.networks.policy_unet import PolicyUNet2DModel
from distill.networks.two_times import ToData, TwoNetworks, TwoTimes
from distill.networks.velocity_edm import VelocityEdmUNet2DModel
from distill.networks.velocity_mlp import VelocityMLP
from distill.networks.velocity_unet import VelocityUNet2DModel
from distill.spec import trainspec
from distill.spec.model import MlpSpec, NetworkSpec, UNetSpec

NETWORKS: dict[str, tuple[type[ModelMixin], ...]] = {  # by the kind of student
    "velocity": (UNet2DModel, VelocityUNet2DModel, VelocityEdmUNet2DModel, VelocityMLP),
    "flow_map": (FlowMapUNet2DModel, FlowMapEdmUNet2DModel, FlowMapMLP, PolicyUNet2DModel, PolicyMLP),
    "acceleration": (AccelerationUNet2DModel, AccelerationMLP),
}

EDM: dict[type[nn.Module], str] = {SongUNet2DModel: "song", DhariwalUNet2DModel: "dhariwal"}
"""networks of the EDM path -> the `design` of a VelocityEdmUNet2DModel"""


def kind_of(network: nn.Module) -> str:
    """Returns the kind of student (a key of `NETWORKS`) that a network belongs to; "velocity" for other classes."""
    if isinstance(network, TwoTimes | ToData | TwoNetworks):
        return "acceleration" if isinstance(network, TwoNetworks) else "flow_map"
    return next((kind for kind, classes in NETWORKS.items() if type(network) in classes), "velocity")


def build(spec: NetworkSpec, shape: tuple[int, ...], num_classes: int | None, seed: int) -> ModelMixin:
    """Builds a float32 network for samples of `shape`, on the CPU.

    A network with K classes has K + 1 class embeddings: class K is the null class. The weights depend only on the
    arguments, and the state of the global generator is not changed. Raises InputError if the spec does not fit `shape`,
    or if the weights are larger than this machine's memory.
    """
    embeddings = None if num_classes is None else num_classes + 1
    size, here = 4 * trainspec.parameters(spec), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > here:
        raise InputError(
            f"network: its weights take about {human(size)}, and this machine has {human(here)}; make it smaller"
        )
    with drawn(seed, "network"):
        if isinstance(spec, MlpSpec):
            return _mlp(spec, shape, embeddings)
        return _unet(spec, shape, embeddings)


def two_times(network: ModelMixin, seed: int) -> ModelMixin:
    """Makes a flow map u(x_t, t, s) from a velocity network of the linear path. At first they are equal for every s.

    Only the weights of the additional input t - s are random; they depend on `seed`.
    """
    with drawn(seed, "second time"):
        if isinstance(network, VelocityEdmUNet2DModel):
            grown: ModelMixin = FlowMapEdmUNet2DModel.from_config(network.config, second_time_waves=SECOND_TIME_WAVES)
        elif isinstance(network, VelocityMLP):
            grown = FlowMapMLP.from_config(network.config)  # with as many waves as for its first time
        else:
            more = _linear(network) | {"second_time_waves": SECOND_TIME_WAVES}
            grown = FlowMapUNet2DModel.from_config(network.config, **more)
    weights = dict(network.state_dict())
    if isinstance(grown, FlowMapUNet2DModel):  # whose `class_embedding` contains that of the velocity network
        weights = {re.sub(r"^class_embedding\.", "class_embedding.classes.", name): t for name, t in weights.items()}
    added = {name: t for name, t in grown.state_dict().items() if name not in weights}
    assert all("gap." in name for name in added), sorted(added)
    grown.load_state_dict({**weights, **added})
    return grown.to(next(network.parameters()).device).train(network.training)


def with_guidance(network: ModelMixin, guidance_range: GuidanceRange, seed: int) -> ModelMixin:
    """Makes a network that takes the guidance scale as a further input, on which it does not depend at first.

    The network is a velocity network of the linear path, or a flow map. Only the weights of the additional input are
    random; they depend on `seed`.
    """
    added: dict[str, object] = {"guidance_range": [*guidance_range]}
    target: type[ModelMixin] = type(network)
    if target is UNet2DModel:
        target, added = VelocityUNet2DModel, added | _linear(network)
    with drawn(seed, "guidance"):
        grown: ModelMixin = target.from_config(network.config, **added)
    weights = dict(network.state_dict())
    own = {name: t for name, t in grown.state_dict().items() if "guidance." in name}
    grown.load_state_dict({**own, **weights})
    return grown.to(next(network.parameters()).device).train(network.training)


def accelerated(network: ModelMixin, seed: int) -> ModelMixin:
    """Adds an acceleration network to a velocity network of the linear path, with the same weights.

    The weights of its additional input, the velocity, are zero, so at first it does not depend on this input.
    """
    if isinstance(network, VelocityEdmUNet2DModel):
        raise InputError("a network of EDM cannot get an acceleration; use a recipe with another kind of student")
    with drawn(seed, "acceleration"):  # all random weights are replaced below
        if isinstance(network, VelocityMLP):
            grown: ModelMixin = AccelerationMLP.from_config(network.config)
        else:
            grown = AccelerationUNet2DModel.from_config(network.config, **_linear(network))
    weights = dict(network.state_dict())
    beside = {f"acceleration.{name}": tensor for name, tensor in weights.items()}
    if isinstance(network, VelocityMLP):
        beside["given.weight"] = torch.zeros_like(grown.given.weight)
    else:
        first = weights["conv_in.weight"]  # [out, C, 3, 3] -> [out, 2 C, 3, 3]
        beside["acceleration.conv_in.weight"] = torch.cat([first, torch.zeros_like(first)], dim=1)
    grown.load_state_dict({**weights, **beside})
    return grown.to(next(network.parameters()).device).train(network.training)


def with_outputs(
    network: ModelMixin, policy: str, count: int, grid: Sequence[float] | None, spread: float, seed: int
) -> ModelMixin:
    """Makes a policy from a velocity network of the linear path: each output of its last layer equals the velocity.

    policy, count, grid: see `networks.policies`. spread: standard deviation of the noise that is added to the last
    layer of each output, relative to that of its weights; it depends on `seed`.
    """
    if isinstance(network, VelocityEdmUNet2DModel):
        raise InputError("a network of EDM cannot get several outputs; use a recipe with another kind of student")
    outputs, config = outputs_of(policy, count), {"policy": policy, "grid": None if grid is None else [*grid]}
    with drawn(seed, "outputs"):  # all random weights are replaced below
        if isinstance(network, VelocityMLP):
            last = f"layers.{len(network.layers) - 1}"
            grown: ModelMixin = PolicyMLP.from_config(network.config, outputs=outputs, **config)
        else:
            last, wide = "conv_out", outputs * network.config.in_channels
            grown = PolicyUNet2DModel.from_config(network.config, out_channels=wide, **_linear(network), **config)
        weights = dict(network.state_dict())
        for name in (f"{last}.weight", f"{last}.bias"):
            repeated = weights[name].repeat(outputs, *[1] * (weights[name].ndim - 1))
            noise = sample_noise(key(seed, "outputs", name), range(len(repeated)), repeated.shape[1:]).to(repeated)
            weights[name] = repeated + spread * weights[f"{last}.weight"].std() * noise if spread else repeated
    grown.load_state_dict(weights)
    return grown.to(next(network.parameters()).device).train(network.training)


def policy_of(network: nn.Module) -> tuple[str, int, list[float] | None] | None:
    """(policy, number of outputs, grid) of a network with several outputs; None for others."""
    match network:
        case PolicyMLP(config=config):
            return config.policy, config.outputs, config.grid
        case PolicyUNet2DModel(config=config):
            return config.policy, config.out_channels // config.in_channels, config.grid
        case _:
            return None


def _linear(network: ModelMixin) -> dict[str, object]:
    """What the config of a U-Net of the linear path lacks for a class that is derived from VelocityUNet2DModel."""
    return {} if isinstance(network, VelocityUNet2DModel) else {"path": "linear", "prediction": "velocity"}


@contextmanager
def drawn(seed: int, name: str) -> Iterator[None]:
    """Context manager: seeds the global CPU generator by (seed, name) and restores its state at exit."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key(seed, name))  # torch.manual_seed would seed the CUDA generators too
        yield


def _mlp(spec: MlpSpec, shape: tuple[int, ...], embeddings: int | None) -> VelocityMLP:
    if len(shape) != 1:
        raise InputError(
            f"network.kind=mlp is for vectors, but samples have shape {list(shape)}; use network.kind=unet"
        )
    return VelocityMLP(
        dim=shape[0], width=spec.width, depth=spec.depth, num_class_embeds=embeddings, frequencies=spec.frequencies
    )


def _unet(spec: UNetSpec, shape: tuple[int, ...], embeddings: int | None) -> UNet2DModel:
    if len(shape) != 3:
        raise InputError(
            f"network.kind=unet is for images [channels, height, width], but samples have shape {list(shape)}; "
            "use network.kind=mlp"
        )
    if not spec.channels:
        raise InputError("network.channels is empty; give one number per resolution, finest first, like [32, 64]")
    indivisible = [c for c in spec.channels if c % spec.norm_groups]
    if indivisible:
        raise InputError(
            f"network.channels={spec.channels}: {indivisible} are not multiples of norm_groups={spec.norm_groups}; "
            "change either"
        )
    levels = len(spec.channels)
    unit = 2 ** (levels - 1)
    if shape[1] % unit or shape[2] % unit:
        raise InputError(
            f"network.channels={spec.channels} halves the image {levels - 1} times, but {shape[1]}x{shape[2]} is not a "
            f"multiple of {unit}; give fewer channels or another image size"
        )
    attentive = spec.attention
    return UNet2DModel(
        sample_size=shape[1] if shape[1] == shape[2] else shape[1:],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=tuple(spec.channels),
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D" if attentive else "DownBlock2D",),
        up_block_types=("AttnUpBlock2D" if attentive else "UpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        layers_per_block=spec.layers_per_block,
        norm_num_groups=spec.norm_groups,
        attention_head_dim=min(8, spec.channels[-1]),
        add_attention=attentive,
        dropout=spec.dropout,
        num_class_embeds=embeddings,
    )
