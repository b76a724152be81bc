"""Makes a network from its config and its safetensors files, and checks that all weights are present and valid.

Names and shapes are compared first, on the meta device, so that a wrong config cannot allocate much memory. Then the
network is made without weights, and each file is loaded into it once. Each weight is converted to the data type of the
network when it is read, so that the memory for the network in float32 is never needed.
"""

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.core.errors import InputError
from distill.teachers.limits import NetworkLimits
from distill.teachers.read import Config, checked, short, unreadable
from distill.teachers.variants import MERGE

FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names of floating-point dtypes
COUNTER = ".num_batches_tracked"  # end of the name of the one integer that a batch norm has
WHOLE_NUMBERS = {"BOOL", "U8", "I16", "I32", "I64"}  # of other networks in the same file
WRAPPERS = ("_orig_mod.", "module.")  # name prefixes added by torch.compile and by (distributed) data parallel training
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # attention in diffusers before 0.15
ADAPTED = ("lora_", "_lora.", ".lora.", ".base_layer.", ".base_model.")  # parts of "." + name of adapted weights


@dataclass(frozen=True)
class Stored:
    """The header entry of a weight in a safetensors file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def network(
    folder: Path,
    config: Config,
    network_class: type[ModelMixin],
    files: Sequence[Path],
    dtype: torch.dtype = torch.float32,
) -> tuple[ModelMixin, list[str]]:
    """Loads a network on the CPU. Returns it with the SHA-256 of each file.

    config: the validated config.json of `folder`. dtype: data type of the weights, except for those in the modules that
    the network's class keeps in float32. Raises InputError if config and weights do not fit together, or if a weight is
    not finite.
    """
    found = fitting(folder, stored(files), shapes(folder, config, network_class))
    empty = unfilled(folder, config, network_class, dtype)
    return empty, [_load(empty, path, found, dtype) for path in files]


def unfilled(folder: Path, config: Config, network_class: type[ModelMixin], dtype: torch.dtype) -> ModelMixin:
    """A network whose parameters have no values yet. Buffers have the values that are computed for them.

    They are computed as in `from_pretrained(torch_dtype=dtype)`, with this data type as the default.
    """
    # The random state is restored after initialization.
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False), _default(dtype):
        empty = built(config, network_class, folder / "config.json")
    empty.register_to_config(_name_or_path="")  # so that the config of a student does not contain local paths
    return empty


def place(network: ModelMixin, name: str, tensor: Tensor, dtype: torch.dtype) -> bool:
    """Sets a weight of a network to a copy of this tensor in the network's data type. Returns whether it is finite."""
    kept = not set(network._keep_in_fp32_modules or []).isdisjoint(name.split("."))
    wanted = (torch.float32 if kept else dtype) if tensor.is_floating_point() else tensor.dtype
    copied = tensor.to(wanted, copy=True).contiguous()  # a copy, because the memory-mapped file may change
    set_module_tensor_to_device(network, name, "cpu", copied, dtype=copied.dtype)
    return bool(copied.isfinite().all())


def not_finite(path: Path, names: Sequence[str], dtype: torch.dtype) -> InputError:
    """Makes the InputError for weights that are not finite in this data type."""
    todo = "give valid weights"
    if dtype == torch.float16:
        todo = "give valid weights, or set another teacher.dtype, as float16 holds numbers up to 65504"
    return InputError(f"{path} contains NaN or infinity in {some(names)}; {todo}")


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Context manager: tensors are made in this data type unless another one is given."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def without_weights(folder: Path, config: Config, network_class: type[ModelMixin]) -> ModelMixin:
    """The network of a config on the meta device: its weights have shapes, and take no memory."""
    with torch.device("meta"):
        return built(config, network_class, folder / "config.json")


def shapes(folder: Path, config: Config, network_class: type[ModelMixin]) -> dict[str, tuple[int, ...]]:
    """The shape of each weight of the network that a config describes. No memory is allocated for the weights."""
    empty = without_weights(folder, config, network_class)
    return {name: tuple(each.shape) for name, each in empty.state_dict().items()}


def built(config: Config, network_class: type[ModelMixin], place: Path) -> ModelMixin:
    """A network with random weights. place: of the config, for the InputError if no network can be built from it."""
    if network_class.__module__.startswith("diffusers."):
        checked(NetworkLimits, config, place)
    known = inspect.signature(network_class.__init__).parameters
    own = {key: value for key, value in config.items() if key in known or key == "_class_name"}
    try:
        return network_class.from_config(own)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, RuntimeError) as error:
        raise InputError(f"no network can be built from {place}: {said(error)}") from error


def said(error: Exception) -> str:
    """What an exception of a network says, for a message."""
    return short(str(error), 200) or type(error).__name__


def stored(files: Sequence[Path]) -> list[Stored]:
    """Reads the headers of the files."""
    found: list[Stored] = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    found.append(Stored(path, name, part.get_dtype(), tuple(part.get_shape())))
        except OSError as error:
            raise unreadable(path, error) from error
        except SafetensorError as error:
            raise damaged(path, error) from error
    return found


def read(path: Path, name: str) -> Tensor:
    """Reads one weight of a file. InputError if the file is damaged, or the weight is not finite."""
    try:
        with safe_open(path, framework="pt") as tensors:
            found: Tensor = tensors.get_tensor(name)
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise damaged(path, error) from error
    if not found.isfinite().all():
        raise not_finite(path, [name], found.dtype)
    return found


def _plain(name: str) -> str:
    """Removes the prefixes of wrappers from a name: every `_orig_mod.`, and each `module.` at the start."""
    name = name.replace(WRAPPERS[0], "")
    while name.startswith(WRAPPERS[1]):
        name = name.removeprefix(WRAPPERS[1])
    return name


def fitting(place: Path, entries: Sequence[Stored], expected: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Maps the names of the network's weights to the stored weights.

    place: file or folder of the weights, for messages. expected: see `shapes`. Raises InputError if weights are
    missing, unknown or duplicate, or have a wrong shape or dtype.
    """
    found: dict[str, Stored] = {}
    for each in entries:
        name = _renamed(_plain(each.name), expected)
        if (before := found.setdefault(name, each)) is not each:
            other = "" if before.file == each.file else f" of {short(before.file.name)}"
            raise InputError(
                f"{each.file}: {short(each.name)} and {short(before.name)}{other} are the same weight, "
                f"{short(name)}; keep only one of them"
            )
    adapted = [name for name in found if name not in expected and any(part in f".{name}" for part in ADAPTED)]
    if adapted:
        raise InputError(f"{place}: the weights contain an adapter (LoRA), like {short(adapted[0])}; {MERGE}")
    wrong = {
        "missing weights": [name for name in expected if name not in found],
        "unknown weights": [name for name in found if name not in expected],
    }
    for what, names in wrong.items():
        if names:
            raise InputError(f"{place}: config.json and the weights do not match: {what}: {some(names)}")
    for name, each in found.items():
        if each.shape != expected[name]:
            raise InputError(
                f"{place}: config.json and the weights do not match: {short(name)} has shape "
                f"{list(each.shape)} in the weights, but config.json implies {list(expected[name])}"
            )
    for name, each in found.items():
        if not (each.dtype == "I64" and name.endswith(COUNTER)):
            refuse_quantized(each.file, name, each.dtype)
    return found


def refuse_quantized(path: Path, name: str, dtype: str) -> None:
    """InputError unless a weight has floating-point numbers of at least 16 bits. dtype: as safetensors names it."""
    if dtype not in FLOATS:
        raise InputError(
            f"{path}: {short(name)} has dtype {short(dtype)}, so the weights are quantized; valid: "
            f"{', '.join(sorted(FLOATS))}. Give the checkpoint in bfloat16 or float16 and set teacher.dtype to that "
            "type; or convert the file: multiply each weight by its scale, if there is one, and save it as bfloat16"
        )


def _renamed(name: str, expected: Mapping[str, tuple[int, ...]]) -> str:
    """Converts a name from old versions of diffusers to the current name."""
    if name in expected:
        return name
    block, _, kind = name.rpartition(".")
    block, _, part = block.rpartition(".")
    return f"{block}.{OLD[part]}.{kind}" if part in OLD else name


def _load(network: ModelMixin, path: Path, found: Mapping[str, Stored], dtype: torch.dtype) -> str:
    """Loads the weights of one file into a network without weights. Returns the SHA-256 of the file.

    The digest is computed right after loading, while the file is in the page cache, so that it is read from disk once.
    Raises InputError if a weight is not finite.
    """
    names = {name: each.name for name, each in found.items() if each.file == path}
    try:
        with safe_open(path, framework="pt") as tensors:
            broken = [name for name, each in names.items() if not place(network, name, tensors.get_tensor(each), dtype)]
        digest = digest_of(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise damaged(path, error) from error
    if broken:
        raise not_finite(path, broken, dtype)
    return digest


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(path: Path, error: Exception) -> InputError:
    """Makes the InputError for a safetensors file that cannot be read."""
    return InputError(f"{path} is truncated or damaged ({short(str(error))}); copy or download it again")


def some(names: Sequence[str]) -> str:
    """Joins up to three names, with the number of the others."""
    return ", ".join(short(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
