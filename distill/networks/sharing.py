"""Networks that share their weights with other networks: one frozen base in memory, whose copies have own adapters.

The weights of a base are the same parameters in all its copies. They are marked, so that training neither changes nor
averages, saves or sends them.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from distill.networks.quantised import parts_of

MARK = "belongs_to_a_base"  # attribute of a parameter
BASE = "base_layer"  # in an adapted layer, as PEFT names it
ADAPTER = ".lora_"  # in the names of the parameters of adapters


def is_shared(parameter: Tensor) -> bool:
    """Whether a parameter belongs to a frozen base. Quantised ones do; they lose the mark when they are moved."""
    return getattr(parameter, MARK, False) or bool(parts_of(parameter))


def has_base(module: nn.Module) -> bool:
    """Whether a module has weights of a frozen base."""
    return any(is_shared(each) for each in module.parameters())


def as_base(network: nn.Module) -> None:
    """Marks all weights of a network, except those of its adapters, as those of a base, unless some are marked already.

    They are frozen.
    """
    if any(getattr(each, MARK, False) for each in network.parameters()):
        return
    for name, parameter in network.named_parameters():
        if ADAPTER not in name:
            setattr(parameter.requires_grad_(False), MARK, True)


def main_dtype(network: nn.Module) -> torch.dtype:
    """The data type of most weights of a network, without its adapters.

    Some classes keep a few layers in float32 whatever the data type of the others is, and these may come first.
    """
    sizes: Counter[torch.dtype] = Counter()
    for name, parameter in network.named_parameters():
        if ADAPTER not in name:
            sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=sizes.__getitem__)


def copy_of(module: nn.Module) -> nn.Module:
    """A copy of a module. The weights of a base in it are shared with the module, and nothing else.

    If there is a base, buffers are shared, too: those of a base are constant.
    """
    shared: list[Tensor] = [each for each in module.parameters() if is_shared(each)]
    if shared:
        shared += module.buffers()
    return deepcopy(module, {id(each): each for each in shared})


def on_cpu(module: nn.Module) -> nn.Module:
    """A copy of a module on the CPU, to be read. If the module is there already, both have the same weights in memory.

    Layers and configs are copied in any case, so that they can be changed.
    """
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    if any(each.device.type != "cpu" for each in tensors):
        return copy_of(module).to("cpu")
    return deepcopy(module, {id(each): each for each in tensors})


def adapted(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of a network that have an adapter, by name. Their base layer is their part `base_layer`."""
    return {
        name: part for name, part in network.named_modules() if any(own == BASE for own, _ in part.named_children())
    }


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without the weights and buffers of a base; the whole state dict if there is none."""
    if not has_base(module):
        return module.state_dict()
    return {name: each for name, each in module.named_parameters() if not is_shared(each)}


def load_own(module: nn.Module, state: Mapping[str, Tensor], *, without: Collection[str] = ()) -> None:
    """Loads what `own_state` returns, one tensor at a time. RuntimeError if it does not fit.

    without: names of tensors that are not loaded.
    """
    own = own_state(module)
    if different := sorted(own.keys() ^ state.keys()):
        raise RuntimeError(f"{'missing' if different[0] in own else 'unknown'}: {different[0]}")
    with torch.no_grad():
        for name, each in own.items():
            if name not in without:
                found = state[name]
                if each.shape != found.shape:
                    raise RuntimeError(f"size mismatch for {name}: {list(found.shape)} instead of {list(each.shape)}")
                each.copy_(found)
