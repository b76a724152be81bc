"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), made by the PEFT library.

The weights W of a layer are frozen and two factors B and A are trained. The layer computes with W + (alpha / rank) B A.
"""

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from types import ModuleType

from torch import Tensor, nn

from distill.core.errors import InputError
from distill.core.text import suggest
from distill.networks.architectures import drawn
from distill.networks.sharing import ADAPTER, BASE, adapted
from distill.protocols import Adapter, Trained

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)  # that may have adapters, if they have no groups


def as_trained(name: str, role: Trained | Adapter, seed: int) -> Trained:
    """Converts the role of network `name` to `Trained`. For an adapter, the adapted network is made here.

    The adapted network is a frozen copy of the base network with adapters in the target layers. Its output is at first
    exactly that of the base network. The adapters' initial weights depend on (seed, name). Raises InputError if a
    target matches no layer.
    """
    if isinstance(role, Trained):
        return role
    peft, network = require_peft(), deepcopy(role.module).requires_grad_(False)
    # A regular expression of full names, because PEFT would also match names that end with a name in a list.
    layers = "|".join(re.escape(layer) for layer in matching(name, role.module, role.targets))
    config = peft.LoraConfig(r=role.rank, lora_alpha=role.alpha, target_modules=layers)
    with drawn(seed, f"adapter of {name}"):
        peft.inject_adapter_in_model(config, network)
    return Trained(network, lr=role.lr)


def merged(role: Trained | Adapter, network: nn.Module) -> nn.Module:
    """Merges the adapters of a network into its weights, in place, and returns the network."""
    if isinstance(role, Trained):
        return network
    layer_type = require_peft().tuners.lora.LoraLayer
    for path, layer in list(network.named_modules()):
        if isinstance(layer, layer_type):
            layer.merge()
            network.set_submodule(path, layer.get_base_layer())
    del network.peft_config  # set by inject_adapter_in_model
    return network


def plain_weights(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network as if it had no adapters. Those that it has are merged, in float32."""
    state = network.state_dict()
    if not any(ADAPTER in name for name in state):
        return state
    found = {name.replace(f".{BASE}.", "."): each for name, each in state.items() if ADAPTER not in name}
    for path, layer in adapted(network).items():
        assert isinstance(layer, require_peft().tuners.lora.LoraLayer)
        (adapter,) = layer.lora_A  # one adapter
        down, up = (each[adapter].weight.detach().double() for each in (layer.lora_A, layer.lora_B))
        change = layer.scaling[adapter] * up.flatten(1) @ down.flatten(1)
        weight = found[f"{path}.weight"]
        found[f"{path}.weight"] = (weight.double() + change.view(weight.shape)).float()
    return found


def adaptable(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d | nn.Conv3d]:
    """The layers that can have adapters, by the names that they have without: linear ones, convolutions without groups.

    PEFT divides the rank of an adapter of a convolution by its groups, of which there are often as many as channels.
    """
    return {
        path.removesuffix(f".{BASE}"): layer
        for path, layer in network.named_modules()
        if isinstance(layer, LAYERS) and getattr(layer, "groups", 1) == 1 and ADAPTER not in path
    }


def matching(name: str, network: nn.Module, targets: Sequence[str]) -> list[str]:
    """The full names of the layers to adapt in network `name`. Raises InputError if a target matches none.

    targets: names of layers, or the ends of their names.
    """
    layers, found = list(adaptable(network)), list[str]()
    for target in targets:
        matched = _named(layers, target)
        if not matched:
            grouped = _named((path for path, part in network.named_modules() if isinstance(part, LAYERS)), target)
            but = ", except a convolution with groups, which cannot have an adapter" if grouped else ""
            raise InputError(
                f"network '{name}': the adapter's target '{target}' matches no linear or convolution layer (by full "
                f"name or last part){but}; {suggest(target, ends(layers))}"
            )
        found += matched
    return list(dict.fromkeys(found))


def _named(paths: Iterable[str], target: str) -> list[str]:
    """The paths that a target names, in full or by their end."""
    return [path for path in paths if path == target or path.endswith(f".{target}")]


def ends(paths: Iterable[str]) -> set[str]:
    """The last part of each name that is not a number, with the numbers that follow it, e.g. "layers.0"."""
    named = {path: re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", path) for path in paths}
    return {path if found is None else found.group() for path, found in named.items()}


def require_peft() -> ModuleType:
    """Imports PEFT. This takes seconds, so it is done only if there is an adapter."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise InputError(
            f"an adapter needs the package {error.name}; pip install 'distill[train]' installs it"
        ) from error
    return peft
