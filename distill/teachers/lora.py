"""Adds a LoRA to the weights of a network: W becomes W + scale alpha/rank B A.

diffusers converts the names of files in other layouts, applies the LoRA and merges it. The network then has the same
weights as before, by name, and no adapter.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import diffusers
import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.core.printing import warn
from distill.networks.adapters import adaptable
from distill.teachers import weights
from distill.teachers.convention import Convention
from distill.teachers.layout import ADAPTERS
from distill.teachers.read import Config, Read, ShortText, checked, parse, short, unreadable
from distill.teachers.variants import listing

GIVEN = "teacher.lora"  # the field of the spec that names the file
NAMES = (ADAPTERS, "adapter_model.safetensors")  # as diffusers and peft write them
SETTINGS = "adapter_config.json"  # of peft, beside its file
EMBEDDED = "lora_adapter_metadata"  # entry of a file's header, with the settings as JSON
PEFT = "base_model.model."  # begins the names of weights that peft has saved
ENCODERS = "text_encoder"  # begins the names of the parts for the text encoders
ModuleName = Annotated[str, Field(max_length=200, pattern=r"^\^?[A-Za-z0-9_.-]+$")]  # peft's patterns may be others
OWN = re.compile(r"(?P<module>.+?)\.(?:lora_[AB]\.(?:weight|bias)|lora_magnitude_vector(?:\.weight)?|alpha)")
# errors of diffusers for files that it cannot convert or add
CONVERSION = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError, AssertionError)


class AdapterSettings(Read):
    """The settings of an adapter that are read. The rank is that of the weights."""

    peft_type: ShortText = "LORA"
    lora_alpha: float | None = None
    alpha_pattern: Annotated[dict[ModuleName, float], Field(max_length=10_000)] = {}
    """by ^ and the name of a module, or by the end of the names of several modules; the first that fits counts"""
    use_rslora: bool = False
    """whether the factor is alpha / sqrt(rank)"""

    def factor(self, module: str, rank: int) -> float:
        """The factor of B A for a module: 1 if alpha is not known."""
        return self.alpha(module, rank) / rank

    def alpha(self, module: str, rank: int) -> float:
        """The alpha of a module with which its factor is alpha / rank."""
        own = [alpha for name, alpha in self.alpha_pattern.items() if _is_meant(name, module)]
        alpha = own[0] if own else self.lora_alpha
        if alpha is None:
            return float(rank)
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


def _is_meant(pattern: str, module: str) -> bool:
    """Whether PEFT applies a pattern to a module: after ^ it is the whole name, else the end of the name."""
    if pattern.startswith("^"):
        return module == pattern[1:]
    return f".{module}".endswith(f".{pattern}")


def merge(network: nn.Module, convention: Convention | None, path: Path, scale: float) -> str:
    """Adds a LoRA to the weights of a network. Returns the SHA-256 of its file.

    path: a safetensors file, or a folder with one. Raises InputError if it is not a LoRA of this network.
    """
    if not isinstance(network, PeftAdapterMixin) or convention is None:
        _file(path, GIVEN)
        raise InputError(
            f"{GIVEN}={path} has no effect on a {type(network).__name__}, because diffusers cannot add a LoRA to it; "
            f"merge it into the weights, and remove {GIVEN}"
        )
    file, prefix = _file(path, GIVEN), _prefix(network)
    scaled = read(network, convention, path)
    before = {name: (each.shape, each.dtype) for name, each in network.state_dict().items()}
    try:
        with torch.random.fork_rng(devices=[]):
            network.load_lora_adapter(
                {f"{prefix}.{name}": each for name, each in scaled.items()},
                prefix=prefix,
                low_cpu_mem_usage=True,
            )
            network.fuse_lora(lora_scale=scale)
            network.unload_lora()
    except CONVERSION as error:
        raise InputError(
            f"{file} does not fit the {type(network).__name__} of this teacher ({short(str(error), 200)}); give a LoRA "
            "that was trained for this model"
        ) from error
    after = network.state_dict()
    assert before == {name: (each.shape, each.dtype) for name, each in after.items()}, "unloading leaves plain weights"
    if broken := [name for name, each in after.items() if not each.isfinite().all()]:
        raise InputError(f"with the LoRA {file}, weights are not finite: {weights.some(broken)}; give another LoRA")
    return weights.digest_of(file)


def read(network: nn.Module, convention: Convention, path: Path, given: str = GIVEN) -> dict[str, Tensor]:
    """The matrices of a LoRA in float32, as LAYER.lora_A.weight and LAYER.lora_B.weight. B contains alpha / rank.

    path: a safetensors file, or a folder with one, in any layout that diffusers converts. given: the field of the spec
    that names it. Raises InputError if it is not a LoRA of this network.
    """
    file, prefix = _file(path, given), _prefix(network)
    tensors, settings = _read(file, prefix, given)
    if not _is_of_diffusers(tensors, network, prefix):
        tensors = _converted(file, tensors, network, convention, given)
    tensors = _of_network(file, tensors, prefix)
    _check(file, tensors, network, given)
    return _scaled(tensors, settings)


def _prefix(network: nn.Module) -> str:
    """How the names of weights begin in files of diffusers."""
    return "unet" if "UNet" in type(network).__name__ else "transformer"


def _file(path: Path, given: str) -> Path:
    """The safetensors file of a LoRA. InputError if there is none, or if there are several."""
    if not path.exists():
        raise InputError(f"{given}={path} does not exist here; download it and give the file or its folder")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"{given}={path}: only safetensors files are loaded; convert it, or give another one")
        return path
    found = sorted(each for each in path.glob("*.safetensors") if each.is_file())
    named = [each for each in found if each.name in NAMES]
    found = named if len(named) == 1 else found
    if len(found) != 1:
        raise InputError(
            f"{given}={path} is a folder with {len(found)} safetensors files ("
            f"{listing(each.name for each in path.iterdir())}); give the path of the file"
        )
    return found[0]


def _read(file: Path, prefix: str, given: str) -> tuple[dict[str, Tensor], AdapterSettings]:
    """The tensors of a file in float32, and the settings in its header or beside it."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except OSError as error:
        raise unreadable(file, error) from error
    except SafetensorError as error:
        raise weights.damaged(file, error) from error
    tensors = {name: each.to(torch.float32, copy=True) for name, each in tensors.items()}
    if broken := [name for name, each in tensors.items() if not each.isfinite().all()]:
        raise weights.not_finite(file, broken, torch.float32)
    beside = file.parent / SETTINGS
    if file.name == NAMES[1] and beside.is_file():
        settings = checked(AdapterSettings, parse(beside), beside)
    else:
        settings = checked(AdapterSettings, embedded_settings(file, header, prefix), file)
    if settings.peft_type != "LORA":
        raise InputError(f"{given}={file} is an adapter of type {short(settings.peft_type)}; valid: LORA")
    return tensors, settings


def embedded_settings(file: Path, header: Mapping[str, str], prefix: str) -> Config:
    """The settings in the header of a file, which diffusers writes as {"transformer.lora_alpha": ..., ...}."""
    try:
        found = json.loads(header.get(EMBEDDED, "{}"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: the entry {EMBEDDED} of its header is not valid JSON; save it again") from error
    content = found if isinstance(found, dict) else {}
    return {key.removeprefix(f"{prefix}."): value for key, value in content.items()}


def _is_of_diffusers(tensors: Mapping[str, Tensor], network: nn.Module, prefix: str) -> bool:
    """Whether all tensors are named after layers of the network, as in files of diffusers and peft."""
    layers = adaptable(network)
    found = [OWN.fullmatch(name.removeprefix(PEFT).removeprefix(f"{prefix}.")) for name in tensors]
    return all(each is not None and each["module"] in layers for each in found)


def _converted(
    file: Path, tensors: dict[str, Tensor], network: nn.Module, convention: Convention, given: str
) -> dict[str, Tensor]:
    """The tensors under the names of diffusers, as the network's pipeline converts them."""
    pipeline = getattr(diffusers, convention.pipelines[0])
    if "lora_state_dict" not in dir(pipeline):
        return tensors
    try:
        found = pipeline.lora_state_dict(dict(tensors), return_alphas=True, unet_config=network.config)
    except CONVERSION as error:
        raise InputError(
            f"{given}={file} is not a LoRA of a {type(network).__name__}, or is in an unknown layout "
            f"({type(error).__name__}: {short(str(error))}); convert it to diffusers' format"
        ) from error
    converted, alphas = found if isinstance(found, tuple) else (found, None)
    return {**converted, **(alphas or {})}


def _of_network(file: Path, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors for the network by module, like MODULE.lora_A.weight or MODULE.alpha."""
    named = {name.removeprefix(PEFT): each for name, each in tensors.items()}
    if any(name.startswith(ENCODERS) for name in named):
        warn(
            f"{file} also changes text encoders, which is not part of the teacher; load it into the pipeline that "
            "makes the embeddings, too"
        )
        named = {name: each for name, each in named.items() if not name.startswith(ENCODERS)}
    named = {name.removeprefix(f"{prefix}."): each for name, each in named.items()}
    alphas = {name: torch.as_tensor(each) for name, each in named.items() if name.endswith(".alpha")}
    found: dict[str, Tensor] = convert_unet_state_dict_to_peft({k: v for k, v in named.items() if k not in alphas})
    # Alphas are named after their layer, or after one of its two matrices.
    layers = {name: convert_unet_state_dict_to_peft({name.removesuffix(".alpha"): None}) for name in alphas}
    return found | {f"{_module(next(iter(layers[name])))}.alpha": each for name, each in alphas.items()}


def _module(name: str) -> str:
    """The name of the layer in the name of a tensor."""
    return name.partition(".lora_")[0].removesuffix(".alpha")


def _check(file: Path, tensors: Mapping[str, Tensor], network: nn.Module, given: str) -> None:
    """InputError unless each tensor belongs to a layer of the network, of which both matrices are there and fit."""
    layers = adaptable(network)
    adapted = {name for name in tensors if ".lora_" in name or name.endswith(".alpha")}
    unknown = sorted(name for name in tensors if name not in adapted or _module(name) not in layers)
    if unknown or not adapted:
        found = f"unknown weights: {weights.some(unknown)}" if unknown else "it has no weights for this network"
        raise InputError(
            f"{given}={file} is not a LoRA of the {type(network).__name__} of this teacher: {found}; give a LoRA "
            "that was trained for this model"
        )
    for name in sorted(adapted):
        down, up = (tensors.get(f"{_module(name)}.lora_{each}.weight") for each in "AB")
        if down is None or up is None:
            missing = f"{_module(name)}.lora_{'A' if down is None else 'B'}.weight"
            raise InputError(f"{given}={file} has {short(name)} but no {short(missing)}; copy or download it again")
        if down.ndim < 2 or up.ndim < 2 or not 1 <= len(down) == up.shape[1]:
            raise InputError(
                f"{given}={file}: the matrices A and B of {short(_module(name))} have shapes {list(down.shape)} and "
                f"{list(up.shape)}; valid: [rank, in, ...] and [out, rank, ...] with a rank of 1 or more"
            )
        if name.endswith(".alpha"):
            number(file, name, tensors[name])


def number(file: Path, name: str, tensor: Tensor) -> float:
    """The number in a tensor like alpha. InputError if it has several values, or none."""
    if tensor.numel() != 1:
        raise InputError(f"{file}: {short(name)} has shape {list(tensor.shape)}; valid: one number")
    return tensor.item()


def _scaled(tensors: Mapping[str, Tensor], settings: AdapterSettings) -> dict[str, Tensor]:
    """The tensors with the factor alpha/rank of each module in its matrix B, so that diffusers needs no alpha."""
    found = {name: each for name, each in tensors.items() if not name.endswith(".alpha")}
    for name, each in found.items():
        if ".lora_B." not in name:
            continue
        module, rank = _module(name), tensors[name.replace(".lora_B.", ".lora_A.").replace(".bias", ".weight")].shape[0]
        alpha = tensors.get(f"{module}.alpha")
        factor = settings.factor(module, rank) if alpha is None else alpha.item() / rank
        found[name] = factor * each
    return found
