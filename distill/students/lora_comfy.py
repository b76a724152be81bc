"""The file of a LoRA that ComfyUI loads, with the names of its own networks.

ComfyUI reads PREFIX.LAYER.lora_A.weight, lora_B.weight and alpha, or lora_down and lora_up. Where one layer of ComfyUI
consists of several layers of diffusers, such as the queries, keys and values of an attention, its matrices are those of
the parts: below each other in A, and as the blocks of a diagonal in B. So the change of the weights is the same.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.core.atomic import write_atomic
from distill.core.errors import InputError
from distill.flow.tensor_bytes import in_safetensors
from distill.students import native
from distill.students.comfy_keys import KeyList, key_list, matches
from distill.students.lora_weights import LoraLayer, LoraWeights, content, pair, rows_of
from distill.students.native import FIRST, SECOND
from distill.teachers.lora import number
from distill.teachers.read import short

RowCounts = Mapping[str, int]  # the rows of each layer of a network by its name
ENDINGS = {FIRST: "_high_noise", SECOND: "_low_noise"}  # of file names, for a network of two


def why_not(weights: LoraWeights, network: nn.Module) -> str:
    """Why ComfyUI cannot load this LoRA, as the end of a sentence; "" if it can.

    network: the one in diffusers, with or without adapters.
    """
    if (keys := key_list(weights.network)) is None:
        return f"ComfyUI has no network like {weights.network}"
    for layers, rows in changed_layers(weights, network).values():
        known = {name for parts in keys.native(rows).values() for name in parts}
        if unknown := [name for name in layers if name not in known]:
            return f"the network of ComfyUI has no layer like {short(unknown[0])}"
    return ""


def write_comfy(
    folder: Path, name: str, weights: LoraWeights, network: nn.Module, dtype: torch.dtype = torch.float32
) -> list[Path]:
    """Writes NAME.safetensors for ComfyUI, or two files if there are two networks, and returns their paths.

    weights: with the name of a class. network: the one in diffusers, with or without adapters, maybe on the meta
    device. The same weights give the same bytes. Raises InputError if `why_not` says why not.
    """
    if reason := why_not(weights, network):
        raise InputError(f"no LoRA file for ComfyUI can be written: {reason}")
    keys = key_list(weights.network)
    assert keys is not None
    parts, paths = changed_layers(weights, network), []
    for component, (layers, rows) in parts.items():
        ending = ENDINGS[component] if isinstance(native.base_of(network), native.Experts) else ""
        path = folder / f"{name}{ending}.safetensors"
        tensors = tensors_of(layers, keys, rows)
        tensors = {name: each if name.endswith(".alpha") else each.to(dtype) for name, each in tensors.items()}
        write_atomic(path, in_safetensors(tensors, {"format": "pt"}))
        paths.append(path)
    return paths


def read_comfy(paths: Sequence[Path], network: nn.Module) -> LoraWeights:
    """The LoRA in the files that `write_comfy` has written for a network of this class.

    Raises InputError if a file is damaged, or of another model.
    """
    base = native.base_of(network)
    experts = isinstance(base, native.Experts)
    found: dict[str, LoraLayer] = {}
    for path in paths:
        component = next((each for each, end in ENDINGS.items() if experts and path.stem.endswith(end)), "")
        part = getattr(base, component) if component else base
        name = type(part).__name__
        if (keys := key_list(name)) is None:
            raise InputError(f"{path} cannot be read: ComfyUI has no network like {name}")
        layers = layers_of(path, content(path)[0], keys, rows_of(part))
        found |= {f"{component}.{each}" if component else each: layer for each, layer in layers.items()}
    convention = native.convention_for(base)
    return LoraWeights(name, convention.folder, found)


def tensors_of(layers: Mapping[str, LoraLayer], keys: KeyList, rows: RowCounts) -> dict[str, Tensor]:
    """The tensors of a file by name. rows: of all layers of the network in diffusers."""
    names, found = keys.native(rows), {}
    down_name, up_name = keys.matrices
    if keys.one_alpha:
        ((alpha, _),) = Counter(layer.alpha for layer in layers.values()).most_common(1)
        layers = {
            name: layer if layer.alpha == alpha else LoraLayer(layer.down, layer.alpha / alpha * layer.up, alpha)
            for name, layer in layers.items()
        }
    for theirs, parts in names.items():
        if not any(part in layers for part in parts):
            continue
        layer = _fused([layers.get(part) for part in parts], [rows[part] for part in parts])
        if matches(keys.swapped, theirs, names):
            layer = LoraLayer(layer.down, _swapped(layer.up), layer.alpha)
        key = _key(keys, theirs)
        if matches(keys.without_alpha, theirs, names):
            layer = LoraLayer(layer.down, layer.alpha / layer.rank * layer.up, float(layer.rank))
        else:
            found[f"{key}.alpha"] = torch.tensor(layer.alpha)
        found |= {f"{key}.{down_name}.weight": layer.down, f"{key}.{up_name}.weight": layer.up}
    return found


def layers_of(path: Path, tensors: Mapping[str, Tensor], keys: KeyList, rows: RowCounts) -> dict[str, LoraLayer]:
    """The layers of diffusers in the tensors of a file. Fused layers are divided: each part has all columns of up.

    Raises InputError for a tensor of another name, or of a shape that does not fit.
    """
    names, left = keys.native(rows), dict(tensors)
    found: dict[str, LoraLayer] = {}
    for theirs, parts in names.items():
        key = _key(keys, theirs)
        down, up = (left.pop(f"{key}.{each}.weight", None) for each in keys.matrices)
        alpha = left.pop(f"{key}.alpha", None)
        if down is None and up is None and alpha is None:
            continue
        layer = pair(path, theirs, down, up, None if alpha is None else number(path, f"{key}.alpha", alpha))
        if len(layer.up) != sum(rows[part] for part in parts):
            raise InputError(
                f"{path}: the layer {short(theirs)} has {len(layer.up)} rows, but in this network it has "
                f"{sum(rows[part] for part in parts)}; give a LoRA of this model"
            )
        ups = _swapped(layer.up) if matches(keys.swapped, theirs, names) else layer.up
        for part, piece in zip(parts, ups.split([rows[part] for part in parts]), strict=True):
            found[part] = LoraLayer(layer.down, piece.contiguous(), layer.alpha)
    if left:
        raise InputError(f"{path} has the tensor {short(next(iter(left)))}, which is of no layer of this network")
    return found


def why_not_in_diffusers(layers: Mapping[str, LoraLayer], keys: KeyList, rows: RowCounts) -> str:
    """Why the converter of diffusers does not read a file of these layers, as the end of a sentence; "" if it does."""
    if (reads := keys.diffusers) is None:
        return "diffusers has no converter for such files"
    names = keys.native(rows)
    for theirs, parts in names.items():
        if not any(part in layers for part in parts):
            if matches(reads.complete, theirs, names):
                return f"diffusers reads such a file only if it also changes layers like {theirs}"
            continue
        if matches(reads.unread, theirs, names):
            return f"diffusers does not read the layer {theirs} of such a file"
        for pattern, count in reads.rows.items():
            if matches([pattern], theirs, names) and sum(rows[part] for part in parts) != count:
                return f"diffusers reads the layer {theirs} of such a file only if it has {count} rows"
    return ""


def changed_layers(weights: LoraWeights, network: nn.Module) -> dict[str, tuple[dict[str, LoraLayer], RowCounts]]:
    """For each network by its folder: the layers that are changed, and the number of rows of all layers."""
    base = native.base_of(network)
    return {
        component: (layers, rows_of(getattr(base, component) if isinstance(base, native.Experts) else base))
        for component, layers in weights.parts.items()
    }


def _fused(layers: Sequence[LoraLayer | None], rows: Sequence[int]) -> LoraLayer:
    """One layer whose rows are those of several. RowCounts of None do not change."""
    present = [layer for layer in layers if layer is not None]
    if len(layers) == 1:
        return present[0]
    factors = {layer.alpha / layer.rank for layer in present}
    rank = sum(layer.rank for layer in present)
    up = torch.zeros(sum(rows), rank)
    row = column = 0
    for layer, count in zip(layers, rows, strict=True):
        if layer is not None:
            factor = 1.0 if len(factors) == 1 else layer.alpha / layer.rank
            up[row : row + count, column : column + layer.rank] = factor * layer.up
            column += layer.rank
        row += count
    alpha = factors.pop() * rank if len(factors) == 1 else rank
    return LoraLayer(torch.cat([layer.down for layer in present]), up, float(alpha))


def _swapped(up: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    first, second = up.chunk(2)
    return torch.cat([second, first])


def _key(keys: KeyList, theirs: str) -> str:
    return keys.prefix + (theirs.replace(".", "_") if keys.underscores else theirs)
