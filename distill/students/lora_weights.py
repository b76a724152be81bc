"""The weights of a LoRA by layer, and the file of a LoRA that diffusers loads.

    weights = from_network(network)            # adapters that networks/adapters.py has put into a network
    write_diffusers(folder, weights)           # pipe.load_lora_weights(folder) then applies them
    weights = read_diffusers(folder)           # checked, also if somebody else has written the files
    add_to(network, weights, trainable=False)  # the same adapters in another network of the class

A layer computes with W + alpha / rank up down. The factor is never multiplied into the matrices: diffusers reads alpha
from the header of the file.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
import peft
import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft.tuners.lora import LoraLayer as PeftLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill.core.atomic import write_atomic
from distill.core.errors import InputError
from distill.core.regular_files import open_regular
from distill.flow.tensor_bytes import in_safetensors
from distill.networks.adapters import adaptable
from distill.students import native
from distill.students.native import FIRST, SECOND
from distill.teachers import weights as stored_weights
from distill.teachers.architectures import convention_of
from distill.teachers.lora import NAMES, PEFT, SETTINGS, AdapterSettings, embedded_settings
from distill.teachers.read import checked, short, unreadable

FILE = LORA_WEIGHT_NAME_SAFE  # pytorch_lora_weights.safetensors
FILE_2 = "pytorch_lora_weights_2.safetensors"  # of the second network
NETWORK = "network"  # entry of the file's header: the class of the network
MOST_LAYERS, LARGEST_RANK = 20_000, 8192
NAME = re.compile(r"(?P<component>transformer|unet)\.(?P<layer>[A-Za-z0-9_.-]{1,200})\.lora_(?P<matrix>[AB])\.weight")


@dataclass(frozen=True)
class LoraLayer:
    """The change of one layer: alpha / rank up down is added to its weight.

    down: [rank, in] of a linear layer, [rank, in, height, width] of a convolution. up: [out, rank], [out, rank, 1, 1].
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def change(self) -> Tensor:
        """alpha / rank up down in float64, with the shape of the layer's weight."""
        up, down = self.up.double().flatten(1), self.down.double().flatten(1)
        return (self.alpha / self.rank * up @ down).reshape(len(self.up), *self.down.shape[1:])


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA of one network.

    network: name of the class, such as FluxTransformer2DModel; "" if a file does not say it. component: the folder of
    the network in its pipeline, "transformer" or "unet". layers: by the name of the module. With two networks, as in
    Wan 2.2, the names begin with "transformer." and "transformer_2.".
    """

    network: str
    component: str
    layers: Mapping[str, LoraLayer]

    @property
    def parts(self) -> dict[str, dict[str, LoraLayer]]:
        """The layers of each network by its folder in the pipeline, under the names that they have in this network."""
        found: dict[str, dict[str, LoraLayer]] = {}
        for name, layer in self.layers.items():
            first, _, rest = name.partition(".")
            component, own = (first, rest) if first in (FIRST, SECOND) else (self.component, name)
            found.setdefault(component, {})[own] = layer
        return found


def from_network(network: nn.Module) -> LoraWeights:
    """The adapters in a network, or in the network of the velocity in a student's. The tensors are float32 copies on
    the CPU.

    Adapters are made by `networks.adapters`, or by `add_to`. A network without adapters gives no layers.
    """
    base = native.base_of(network)
    layers = {}
    for name, module in base.named_modules():
        if isinstance(module, PeftLayer):
            (adapter,) = module.lora_A  # one adapter
            down, up = (
                each[adapter].weight.detach().to("cpu", torch.float32, copy=True).contiguous()
                for each in (module.lora_A, module.lora_B)
            )
            layers[name] = LoraLayer(down, up, float(module.lora_alpha[adapter]))
    first = base.transformer if isinstance(base, native.Experts) else base
    convention = convention_of(base)
    return LoraWeights(type(first).__name__, "unet" if convention is None else convention.folder, layers)


def add_to(network: nn.Module, weights: LoraWeights, *, trainable: bool = False) -> None:
    """Puts adapters with these values into a network, or into the network of the velocity in a student's.

    The adapters are in float32. If not `trainable`, they are frozen. Weights of the base stay as they are, and share
    their memory with whatever they have shared it with. Raises InputError if a layer is not one of the network's, or
    has another shape.
    """
    base = native.base_of(network)
    possible = adaptable(base)
    for name, layer in weights.layers.items():
        if name not in possible:
            raise InputError(
                f"the LoRA changes the layer {short(name)}, which a {type(base).__name__} does not have; give a LoRA "
                "that was trained for this model"
            )
        weight, shape = possible[name].weight, (len(layer.up), *layer.down.shape[1:])
        if tuple(weight.shape) != shape:
            raise InputError(
                f"the LoRA changes weights of shape {list(shape)} in the layer {short(name)}, which has shape "
                f"{list(weight.shape)} in this network; give a LoRA that was trained for this model"
            )
    if not weights.layers:
        raise InputError("the LoRA changes no layer; give another one")
    was_trained = {name: each.requires_grad for name, each in base.named_parameters()}
    names = "|".join(re.escape(name) for name in weights.layers)
    config = peft.LoraConfig(**{**_settings(weights.layers), "target_modules": names})
    with torch.random.fork_rng(devices=[]):
        peft.inject_adapter_in_model(config, base)
    for name, parameter in base.named_parameters():  # PEFT freezes all others
        parameter.requires_grad_(was_trained.get(name.replace(".base_layer.", "."), trainable))
    for name, layer in weights.layers.items():
        module = base.get_submodule(name)
        assert isinstance(module, PeftLayer)
        (adapter,) = module.lora_A
        device = module.get_base_layer().weight.device
        for mine, value in ((module.lora_A, layer.down), (module.lora_B, layer.up)):
            mine[adapter].weight.data = value.to(device, torch.float32, copy=True)
        assert module.scaling[adapter] == layer.alpha / layer.rank, f"{name} has a factor of its own"


def write_diffusers(folder: Path, weights: LoraWeights, dtype: torch.dtype = torch.float32) -> None:
    """Writes the file pytorch_lora_weights.safetensors, which `pipe.load_lora_weights(folder)` loads.

    diffusers loads a file into one network. Therefore, the second network of Wan 2.2 has a file of its own:
    `pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights_2.safetensors", load_into_transformer_2=True)`.
    diffusers cannot add a LoRA to some classes (see `needs_peft`). For these, the files of PEFT are written, too:
    `peft.PeftModel.from_pretrained(pipe.transformer, folder)`. The same weights give the same bytes. Raises RunError if
    it cannot write.

    dtype: of the matrices in the file.
    """
    if needs_peft(weights.network):
        _write_peft(folder, weights, dtype)
    for component, layers in weights.parts.items():
        prefix = FIRST if component == SECOND else component
        header = {f"{prefix}.{key}": value for key, value in _settings(layers).items()}
        tensors = {}
        for name, layer in layers.items():
            tensors[f"{prefix}.{name}.lora_A.weight"] = layer.down.to(dtype)
            tensors[f"{prefix}.{name}.lora_B.weight"] = layer.up.to(dtype)
        path = file_of(folder, component)
        settings = json.dumps(header, indent=2, sort_keys=True)
        own = {NETWORK: weights.network} if weights.network else {}
        write_atomic(path, in_safetensors(tensors, {"format": "pt", LORA_ADAPTER_METADATA_KEY: settings, **own}))


def needs_peft(network: str) -> bool:
    """Whether diffusers cannot add a LoRA to the networks of this class, and PEFT has to do it."""
    found = getattr(diffusers, network, None)
    return found is not None and not issubclass(found, PeftAdapterMixin)


def read_diffusers(path: Path) -> LoraWeights:
    """The LoRA in a folder, or in a single file, in the layout of `write_diffusers`.

    Raises InputError if it is in another layout, damaged, or has values that are not finite.
    """
    if file_of(path, SECOND).exists():
        parts = {each: _read(file_of(path, each)) for each in (FIRST, SECOND) if file_of(path, each).exists()}
        if any(each.component != FIRST for each in parts.values()):
            raise InputError(f"{path}: with {FILE_2}, both must be for transformers; copy it again")
        layers = {f"{part}.{name}": layer for part, each in parts.items() for name, layer in each.layers.items()}
        return LoraWeights(parts[SECOND].network, FIRST, layers)
    return _read(path / FILE if path.is_dir() else path)


def file_of(folder: Path, component: str) -> Path:
    """The file of a LoRA for the network in this folder of a pipeline."""
    return folder / (FILE_2 if component == SECOND else FILE)


def _settings(layers: Mapping[str, LoraLayer]) -> dict[str, object]:
    """The options of PEFT's LoraConfig. Ranks and alphas that differ from the most frequent one are given by layer."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.alpha for name, layer in layers.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(layers),
        # PEFT reads a key as a pattern for the end of a name; ^ makes it the whole name
        "rank_pattern": {f"^{name}": each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {f"^{name}": each for name, each in alphas.items() if each != alpha},
    }


def _write_peft(folder: Path, weights: LoraWeights, dtype: torch.dtype) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, which PEFT loads."""
    tensors = {}
    for name, layer in weights.layers.items():
        tensors[f"{PEFT}{name}.lora_A.weight"] = layer.down.to(dtype)
        tensors[f"{PEFT}{name}.lora_B.weight"] = layer.up.to(dtype)
    settings = {"peft_type": "LORA", **_settings(weights.layers)}
    write_atomic(folder / NAMES[1], in_safetensors(tensors, {"format": "pt"}))
    write_atomic(folder / SETTINGS, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _read(path: Path) -> LoraWeights:
    """The LoRA in one file."""
    tensors, header = content(path)
    pairs: dict[str, dict[str, Tensor]] = {}
    components = set()
    for name, tensor in tensors.items():
        if (found := NAME.fullmatch(name)) is None:
            raise InputError(
                f"{path} has the tensor {short(name)}; valid in a LoRA of diffusers: transformer.LAYER.lora_A.weight "
                "and transformer.LAYER.lora_B.weight, or unet. in place of transformer."
            )
        components.add(found["component"])
        pairs.setdefault(found["layer"], {})[found["matrix"]] = tensor
    if len(components) != 1:
        raise InputError(f"{path} has layers of {len(components)} networks; valid: of one, transformer or unet")
    (component,) = components
    settings = checked(AdapterSettings, embedded_settings(path, header, component), path)
    if settings.peft_type != "LORA":
        raise InputError(f"{path} is an adapter of type {short(settings.peft_type)}; valid: LORA")
    layers = {}
    for name, each in pairs.items():
        rank = len(each["A"]) if "A" in each and each["A"].ndim else 1
        layers[name] = pair(path, name, each.get("A"), each.get("B"), settings.alpha(name, rank))
    return LoraWeights(header.get(NETWORK, "") if header.get(NETWORK, "").isidentifier() else "", component, layers)


def pair(path: Path, name: str, down: Tensor | None, up: Tensor | None, alpha: float | None) -> LoraLayer:
    """A layer from the matrices of a file. alpha: None stands for the rank. Raises InputError if they do not fit."""
    if down is None or up is None:
        missing = "A" if down is None else "B"
        raise InputError(f"{path} has no matrix {missing} for {short(name)}; copy or download it again")
    rank = len(down) if down.ndim else 0
    fits = down.ndim in (2, 4, 5) and up.ndim == down.ndim and up.shape[1] == rank
    if not (fits and all(side == 1 for side in up.shape[2:]) and 1 <= rank <= LARGEST_RANK):
        raise InputError(
            f"{path}: the matrices of {short(name)} have shapes {list(down.shape)} and {list(up.shape)}; valid: "
            f"[rank, in, ...] and [out, rank, ...] with a rank of 1 to {LARGEST_RANK}"
        )
    alpha = float(rank) if alpha is None else alpha
    if not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"{path} gives {short(name)} the alpha {alpha}; valid: a finite number above 0")
    return LoraLayer(down, up, alpha)


def rows_of(network: nn.Module) -> dict[str, int]:
    """The number of rows (outputs) of each layer that can have a LoRA, by its name without adapters."""
    return {name: len(layer.weight) for name, layer in adaptable(network).items()}


def content(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of a file in float32, and its header."""
    try:
        open_regular(path, follow=True).close()  # raises an OSError for a FIFO or a device
        with safe_open(path, framework="pt") as opened:
            header = opened.metadata() or {}
            names = list(opened.keys())
            if not 1 <= len(names) <= 2 * MOST_LAYERS:
                raise InputError(f"{path} has {len(names)} tensors; valid: 1 to {2 * MOST_LAYERS}")
            tensors = {name: opened.get_tensor(name) for name in names}
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise stored_weights.damaged(path, error) from error
    for name, each in tensors.items():
        if not each.is_floating_point():
            raise InputError(f"{path}: {short(name)} has dtype {each.dtype}; valid: floating-point numbers")
    tensors = {name: each.to(torch.float32, copy=True) for name, each in tensors.items()}
    if broken := [name for name, each in tensors.items() if not each.isfinite().all()]:
        raise stored_weights.not_finite(path, broken, torch.float32)
    return tensors, header
