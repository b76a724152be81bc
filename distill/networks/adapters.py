"""Low-rank adapters (Hu et al. 2021, LoRA, arXiv 2106.09685): beside the frozen weights W of a layer, factors B and A
are trained, and the layer computes with W + alpha / rank B A. PEFT makes the layers.
"""

import re
from copy import deepcopy
from types import ModuleType

from torch import nn

from distill.core.errors import InputError
from distill.core.text import suggest
from distill.networks.architectures import drawn
from distill.protocols import Adapter, Trained


def as_trained(name: str, role: Trained | Adapter, seed: int) -> Trained:
    """The role of network `name` with the module that is trained: an adapter's is made here.

    An adapted network is a copy of its base, frozen, with adapters in the target layers, whose first weights are keyed
    by (seed, name). It starts as its base, exactly.
    """
    if isinstance(role, Trained):
        return role
    peft, network = _peft(), deepcopy(role.module).requires_grad_(False)
    # A pattern of whole names: PEFT would take a list of names for suffixes of further ones.
    layers = "|".join(re.escape(layer) for layer in _targets(name, role))
    config = peft.LoraConfig(r=role.rank, lora_alpha=role.alpha, target_modules=layers)
    with drawn(seed, f"adapter of {name}"):
        peft.inject_adapter_in_model(config, network)
    return Trained(network, lr=role.lr)


def merged(role: Trained | Adapter, network: nn.Module) -> nn.Module:
    """The network of a role without adapters: their product is added to the weights, in place."""
    if isinstance(role, Trained):
        return network
    layer_type = _peft().tuners.lora.LoraLayer
    for path, layer in list(network.named_modules()):
        if isinstance(layer, layer_type):
            layer.merge()
            network.set_submodule(path, layer.get_base_layer())
    del network.peft_config  # PEFT's note of what it has put in
    return network


def _targets(name: str, role: Adapter) -> list[str]:
    """Names of the layers that are adapted."""
    layers = [path for path, layer in role.module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    found: list[str] = []
    for target in role.targets:
        matched = [path for path in layers if path == target or path.endswith(f".{target}")]
        if not matched:
            raise InputError(
                f"network '{name}': the adapter's target '{target}' is the name, or the end of the name, of no linear "
                f"or convolution layer; {suggest(target, _ends(layers))}"
            )
        found += matched
    return list(dict.fromkeys(found))


def _ends(paths: list[str]) -> set[str]:
    """The last part of each name; where that is a number, with the part before it."""
    named = [re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", path) for path in paths]
    return {path if found is None else found.group() for path, found in zip(paths, named, strict=True)}


def _peft() -> ModuleType:
    """Imported only where there is an adapter: it takes seconds."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise InputError(
            f"an adapter needs the package {error.name}; pip install 'distill[train]' brings it"
        ) from error
    return peft
