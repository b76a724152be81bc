"""The adapters of networks that share a base: new ones, those of a LoRA file, or those of the student before."""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from peft.tuners.lora import LoraLayer as PeftLayer
from torch import nn

from distill.core.errors import InputError
from distill.networks.adapters import adaptable, matching
from distill.networks.architectures import drawn
from distill.networks.experts import Experts
from distill.networks.sharing import has_base
from distill.spec.rolespec import LoraSpec
from distill.students import lora_weights, native
from distill.students.lora_weights import LoraLayer, LoraWeights
from distill.teachers import lora as lora_files
from distill.teachers.read import short


def adapt(role: str, module: nn.Module, spec: LoraSpec, seed: int) -> None:
    """Gives the networks in a module adapters in float32, which are trained."""
    networks = list(_networks(module))
    if not networks or not has_base(module):
        raise InputError(f"lora.{role}: '{role}' is not made from the teacher's network; remove it")
    for path, network in networks:
        where = f"lora.{role}"
        if any(isinstance(part, PeftLayer) for part in network.modules()):
            _continue(where, role, network, spec)
            continue
        if spec.path is not None:
            weights = _read(where, role, network, spec)
        else:
            with drawn(seed, f"adapter of {role}{path}"):
                weights = _new(network, _targets(where, role, network, spec), spec)
        lora_weights.add_to(network, weights, trainable=True)


def _networks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The networks of latent-space pipelines in a module, by their names; two that are called as one are one."""
    for name, part in module.named_children():
        if native.is_native(part) and not isinstance(part, native.WRAPPERS):
            yield f"{path}.{name}", part
        else:
            yield from _networks(part, f"{path}.{name}")


def _targets(where: str, role: str, network: nn.Module, spec: LoraSpec) -> list[str]:
    """The names of the layers that get adapters."""
    if spec.targets is not None:
        return _with_effect(network, dict.fromkeys(matching(role, network, spec.targets)))
    if not (found := attention_layers(network)):
        raise InputError(f"{where}.targets: {type(network).__name__} has no attention; name layers in targets")
    return found


def attention_layers(network: nn.Module) -> list[str]:
    """The names of the linear layers in the attention of a network that have an effect on its output."""
    found = (
        f"{path}.{name}"
        for path, part in network.named_modules()
        if isinstance(part, Attention | AttentionModuleMixin)
        for name, layer in part.named_modules()
        if isinstance(layer, nn.Linear)
    )
    return _with_effect(network, dict.fromkeys(found))


def _with_effect(network: nn.Module, layers: Iterable[str]) -> list[str]:
    """Those of these layers that have an effect on the output."""
    parts = native.parts_of(network)
    unused = [prefix + name for prefix, part in parts for name in native.convention_for(part).unused(part)]
    return [name for name in layers if not any(f"{name}.".startswith(f"{each}.") for each in unused)]


def _new(network: nn.Module, layers: list[str], spec: LoraSpec) -> LoraWeights:
    """Adapters that do not change the output: A is random, as in PEFT, and B is zero."""
    found, alpha = {}, float(spec.rank if spec.alpha is None else spec.alpha)
    possible = adaptable(network)
    for name in layers:
        out, width, *sides = possible[name].weight.shape
        down = torch.empty(spec.rank, width, *sides)
        nn.init.kaiming_uniform_(down, a=5**0.5)
        found[name] = LoraLayer(down, torch.zeros(out, spec.rank, *(1 for _ in sides)), alpha)
    return LoraWeights("", "", found)


def _read(where: str, role: str, network: nn.Module, spec: LoraSpec) -> LoraWeights:
    """The LoRA that the adapters start from. InputError unless it has the rank and the layers of the spec."""
    assert spec.path is not None
    field, convention = f"{where}.path", native.convention_for(network)
    if isinstance(network, Experts):
        raise InputError(f"{field}={spec.path}: a LoRA is of one network, and the teacher has two; remove path")
    tensors, layers = lora_files.read(network, convention, Path(spec.path), field), {}
    if other := sorted(name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))):
        raise InputError(
            f"{field}={spec.path} has {short(other[0])}; adapters can start only from the matrices A and B of a LoRA, "
            "without biases and magnitudes"
        )
    alpha = float(spec.rank if spec.alpha is None else spec.alpha)
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            _check_rank(f"{field}={spec.path}", layer, len(down), spec, where)
            layers[layer] = LoraLayer(down, tensors[f"{layer}.lora_B.weight"] / spec.scale, alpha)
    _check_layers(f"{field}={spec.path}", role, network, layers, spec, where)
    return LoraWeights("", "", layers)


def _check_layers(what: str, role: str, network: nn.Module, found: Collection[str], spec: LoraSpec, where: str) -> None:
    """InputError if the spec names other layers than those that have adapters."""
    if spec.targets is None:
        return
    wanted = set(matching(role, network, spec.targets))
    # Layers without effect get no new adapters, but a LoRA of others may have some there.
    if different := sorted(_with_effect(network, wanted ^ set(found))):
        has = "has no adapter" if different[0] in wanted else "has an adapter"
        raise InputError(
            f"{where}.targets: {what} {has} in {short(different[0])}, unlike targets; remove targets, so that the "
            "layers stay the same"
        )


def _check_rank(what: str, layer: str, rank: int, spec: LoraSpec, where: str) -> None:
    if rank != spec.rank:
        raise InputError(
            f"{what}: the adapter of {short(layer)} has the rank {rank}, but {where}.rank is {spec.rank}; set it to "
            f"{rank}"
        )


def _continue(where: str, role: str, network: nn.Module, spec: LoraSpec) -> None:
    """Trains the adapters that a network has. InputError unless they have the rank and the layers of the spec."""
    found = {name: part for name, part in network.named_modules() if isinstance(part, PeftLayer)}
    what = "the student that is continued"
    if spec.path is not None:
        raise InputError(f"{where}.path: the adapters start from those of a student, so this has no effect; remove it")
    _check_layers(what, role, network, found, spec, where)
    for name, part in found.items():
        (adapter,) = part.lora_A
        _check_rank(what, name, part.r[adapter], spec, where)
        with torch.no_grad():
            part.lora_B[adapter].weight.mul_(part.scaling[adapter] / spec.scale)
        part.lora_alpha[adapter] = float(spec.rank if spec.alpha is None else spec.alpha)
        part.scaling[adapter] = spec.scale
        for parameter in (*part.lora_A.parameters(), *part.lora_B.parameters()):
            parameter.requires_grad_(True)
