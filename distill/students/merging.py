"""Adds a LoRA to the weights of a network, and takes it out again.

Each weight is computed in float64 and rounded once to its own type. `unmerge` therefore gives back the weights up to
rounding: the type of a merged weight cannot hold all digits of the original.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.networks.adapters import adaptable
from distill.students.lora_weights import LoraWeights
from distill.teachers.read import short


@torch.no_grad()
def merge(network: nn.Module, lora: LoraWeights, scale: float = 1.0) -> None:
    """Adds scale alpha / rank up down to the weight of each layer, in place.

    Raises InputError, and changes nothing, if the LoRA is not one of this network. Raises InputError if a weight is
    then not finite.
    """
    layers = _layers(network, lora)
    for name, layer in lora.layers.items():
        weight = layers[name]
        weight.copy_(weight.double() + scale * layer.change.to(weight.device))  # rounds once
        if not weight.isfinite().all():
            raise InputError(
                f"with the LoRA, the weights of {short(name)} are not finite in {weight.dtype}; use a smaller --scale, "
                "or another LoRA"
            )


@torch.no_grad()
def unmerge(
    network: nn.Module, lora: LoraWeights, scale: float = 1.0, original: Mapping[str, Tensor] | None = None
) -> None:
    """Takes a LoRA that was merged with this scale out of the weights, in place. Raises InputError as `merge` does.

    original: the weights before the merge by name, like `state_dict`. Each layer whose merged weight follows from its
    original one bit for bit then gets that one back exactly, instead of up to rounding.
    """
    if original is None:
        merge(network, lora, -scale)
        return
    layers = _layers(network, lora)
    for name, layer in lora.layers.items():
        weight, before = layers[name], original[f"{name}.weight"].to(layers[name].device)
        change = scale * layer.change.to(weight.device)
        merged = (before.double() + change).to(weight.dtype)
        weight.copy_(before if torch.equal(merged, weight) else weight.double() - change)


def _layers(network: nn.Module, lora: LoraWeights) -> dict[str, Tensor]:
    """The weights of the layers of a network. Raises InputError unless the LoRA fits it."""
    layers, kind = {name: each.weight for name, each in adaptable(network).items()}, type(network).__name__
    if not lora.layers:
        raise InputError("the LoRA changes no layer; give another one")
    for name, layer in lora.layers.items():
        if name not in layers:
            raise InputError(
                f"the LoRA changes the layer {short(name)}, which this {kind} does not have; give a LoRA that was "
                "trained for this model"
            )
        given, valid = [len(layer.up), *layer.down.shape[1:]], list(layers[name].shape)
        if given != valid:
            raise InputError(
                f"the LoRA changes weights of shape {given} in the layer {short(name)}, which has shape {valid} in "
                f"this {kind}; give a LoRA that was trained for this model"
            )
    return layers
