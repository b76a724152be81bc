"""Reads pickled checkpoints, in a process of its own: `python -m distill.convert.unpickle REQUEST`.

A pickle can name any function of any package, and Python's unpickler calls it. Here, only the functions that rebuild
tensors are called. Other classes are replaced by a `StandIn`, which keeps what it is given and does nothing, and their
packages are not imported. Functions of Python itself, such as os.system, are refused by name.

Files that torch.save wrote are read by torch.load with weights_only=True. Other pickles are read by `Restricted`.

This is the only module that unpickles anything.
"""

import io
import json
import pickle
import re
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.core.errors import EXIT_INPUT, InputError
from distill.core.text import one_line

WEIGHTS, FACTS = "unpickled.safetensors", "unpickled.json"  # the files that this process writes
ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # how the files of torch.save begin, and pickles of protocol 2 or newer
OLD_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how the files of torch.save began before torch 1.6
DEEPEST = 3  # at most this many keys lead to a state dict
LISTED = 20  # at most this many state dicts are listed in a message
HARMLESS = {  # data of Python itself, often stored beside weights
    "argparse.Namespace",
    "builtins.slice",
    "collections.Counter",
    "collections.defaultdict",
    "datetime.datetime",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "typing.Any",
}
DAMAGED = (  # what reading a truncated or damaged pickle raises
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class StandIn:
    """Stands in for an object of a class that is not imported. Subclasses have the name of that class."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.state = {str(key): value for key, value in state.items()} if isinstance(state, dict) else {}

    def __setitem__(self, key: object, value: object) -> None:
        """Of a class that is a dictionary."""

    def append(self, value: object) -> None:
        """Of a class that is a list."""

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """The state dict of a torch module: its parameters and persistent buffers, then those of its submodules."""
        temporary = self.state.get("_non_persistent_buffers_set") or ()
        for name, value in [*_items(self.state, "_parameters"), *_items(self.state, "_buffers")]:
            if isinstance(value, Tensor) and name not in temporary:
                yield prefix + name, value
        for name, value in _items(self.state, "_modules"):
            if isinstance(value, StandIn):
                yield from value.tensors(f"{prefix}{name}.")

    def is_module_with_parameters(self) -> bool:
        own = any(isinstance(value, Tensor) for _, value in _items(self.state, "_parameters"))
        inside = (value for _, value in _items(self.state, "_modules") if isinstance(value, StandIn))
        return own or any(each.is_module_with_parameters() for each in inside)

    def facts(self, *, modules: bool = True) -> dict[str, object]:
        """The name of the class, and its options: plain values only, with None in place of others."""
        inside = _items(self.state, "_modules") if modules else []
        return {
            "class_name": type(self).__name__,
            "arguments": _plain(self.state.get("_init_args") or ()),
            "options": _plain(self.state.get("_init_kwargs") or {}),
            "values": {
                name: value for name, value in self.state.items() if isinstance(value, bool | int | float | str)
            },
            "modules": {name: each.facts(modules=False) for name, each in inside if isinstance(each, StandIn)},
        }


@dataclass(frozen=True)
class AllowedFunction:
    """A function that a pickle may call. It cannot be changed by the pickle."""

    call: Callable[..., object]

    def __call__(self, *arguments: object) -> object:
        return self.call(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a function has no state")


@dataclass(frozen=True)
class StateDict:
    """Tensors by name. owner: the module that they belong to, if the file contains the module itself."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    owner: StandIn | None = None


class Restricted(pickle.Unpickler):
    """Unpickles only tensors, plain data and stand-ins."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        found = ALLOWED.get(f"{module}.{name}")
        return stand_in(f"{module}.{name}") if found is None else found

    def persistent_load(self, pid: object) -> object:
        raise pickle.UnpicklingError("it refers to objects in another file")


def stand_in(name: str) -> type[StandIn]:
    """A class to take the place of another. InputError if that is part of Python or a function of torch.

    name: the full name of the class. Names of builtins may lack their module.
    """
    module, _, last = name.rpartition(".")
    root = module.partition(".")[0] or "builtins"
    python = root in sys.stdlib_module_names or root in ("__builtin__", "__builtins__")
    if name not in HARMLESS and (python or (root == "torch" and not module.startswith("torch.nn."))):
        raise InputError(
            f"it refers to {one_line(name)}, which weights do not need, and which could run other programs. Nothing of "
            "it was run. Do not use this file, unless you can get its weights in another format"
        )
    return type(last, (StandIn,), {})


def _items(state: Mapping[str, Any], key: str) -> list[tuple[str, object]]:
    found = state.get(key)
    return [(str(name), value) for name, value in found.items()] if isinstance(found, dict) else []


def _plain(value: object) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool | int | float | str) else None


def _storage(content: bytes) -> torch.TypedStorage:
    """The numbers of a tensor, which a plain pickle stores as the content of a file of torch.save."""
    found = _of_torch(content)
    if not isinstance(found, torch.TypedStorage):
        raise pickle.UnpicklingError("a tensor has no numbers")
    return found


def _number(kind: StandIn, content: bytes) -> object:
    """A NumPy scalar, from its data type and its bytes."""
    name = kind.arguments[0] if kind.arguments else None
    if name not in ("f8", "f4", "i8", "i4", "b1"):
        return None
    return np.frombuffer(content, dtype=np.dtype(name))[0].item()


def _text(content: str, encoding: str) -> bytes:
    """Bytes in a pickle of protocol 2, which stores them as text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it contains bytes in the encoding {encoding}")
    return content.encode(encoding)


def _module(meta: dict[str, Any]) -> StandIn:
    """A module that NVIDIA's torch_utils.persistence stored with its source code, which is neither kept nor run."""
    found = type(str(meta["class_name"]), (StandIn,), {})()
    found.__setstate__(meta["state"])
    return found


ALLOWED: Mapping[str, object] = {
    "_codecs.encode": AllowedFunction(_text),
    "__builtin__.set": set,
    "builtins.set": set,
    "collections.OrderedDict": OrderedDict,
    "dnnlib.util.EasyDict": dict,
    "numpy._core.multiarray.scalar": AllowedFunction(_number),
    "numpy.core.multiarray.scalar": AllowedFunction(_number),
    "torch._utils._rebuild_parameter": AllowedFunction(torch._utils._rebuild_parameter),
    "torch._utils._rebuild_tensor_v2": AllowedFunction(torch._utils._rebuild_tensor_v2),
    "torch.storage._load_from_bytes": AllowedFunction(_storage),
    "torch_utils.persistence._reconstruct_persistent_obj": AllowedFunction(_module),
}


def read(path: Path) -> object:
    """What a pickled file contains. InputError if it is damaged, no pickle, or refers to what is not allowed."""
    try:
        with path.open("rb") as file:
            start = file.read(len(OLD_TORCH))
            if start.startswith(ZIP) or start == OLD_TORCH:
                return _of_torch(path, mapped=start.startswith(ZIP))
            if not start.startswith(PICKLE):
                raise InputError("it is not a pickled file; give a .bin, .ckpt, .pt, .pth or .pkl file")
            file.seek(0)
            return Restricted(file).load()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except DAMAGED as error:
        raise InputError(
            f"{path} is truncated or damaged, or not a checkpoint ({_reason(error)}); copy or download it again"
        ) from error


def _reason(error: BaseException) -> str:
    """What an error says, without the advice that torch.load adds."""
    said = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    return one_line(said.strip().partition("\n")[0], 150) or type(error).__name__


def _of_torch(source: Path | bytes, *, mapped: bool = False) -> object:
    """The content of a file of torch.save. Each class that torch.load refuses is replaced by a stand-in, if allowed.

    mapped: map the file into memory instead of reading it, which is possible for zip files.
    """
    replaced: dict[str, Any] = {}
    while True:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        try:
            with torch.serialization.safe_globals([(each, name) for name, each in replaced.items()]):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            if found is None or found[1] in replaced:
                raise
            replaced[found[1]] = ALLOWED.get(found[1]) or stand_in(found[1])


def state_dicts(content: object, name: str = "", deepest: int = DEEPEST) -> dict[str, StateDict]:
    """The state dicts in the content of a file, by the keys that lead to them: "" for the content itself."""
    if isinstance(content, StandIn):
        return {name: StateDict(dict(content.tensors()), content)} if content.is_module_with_parameters() else {}
    if not isinstance(content, dict):
        return {}
    inside = {key: value for key, value in content.items() if isinstance(key, str)}
    if not any(isinstance(value, dict | StandIn) for value in inside.values()):
        tensors = {key: value for key, value in inside.items() if isinstance(value, Tensor)}
        return {name: StateDict(tensors)} if tensors else {}
    found: dict[str, StateDict] = {}
    for key, value in inside.items():
        if deepest and "optim" not in key.lower():
            found |= state_dicts(value, f"{name}.{key}" if name else key, deepest - 1)
    return found


def chosen(found: Mapping[str, StateDict], wanted: str | None, *, ema: bool) -> str:
    """The name of the state dict to convert. InputError if it is not clear which one.

    wanted: its name, if the user gave one. ema: prefer the one that is an average of the weights.
    """
    listed = ", ".join(one_line(name) or "the file itself" for name in list(found)[:LISTED])
    if not found:
        raise InputError("it contains no state dict (tensors by name), which is what can be converted")
    if wanted is not None:
        if wanted not in found:
            raise InputError(f"--weights {one_line(wanted)}: it contains no such state dict; valid: {listed}")
        return wanted
    fitting = list(found) if len(found) == 1 else [name for name in found if _is_average(name) == ema]
    if len(fitting) != 1:
        raise InputError(f"it contains the state dicts {listed}; choose one of them with --weights NAME")
    return fitting[0]


def _is_average(name: str) -> bool:
    return re.search(r"(?:^|[._])ema(?:$|[._])", name.lower()) is not None


def converted(files: list[Path], wanted: str | None, *, ema: bool) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors of the chosen state dict, which may be divided among files, and what else the files contain."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, object] = {}
    for path in files:
        found = state_dicts(read(path))
        try:
            name = chosen(found, wanted, ema=ema)
            for key, each in found[name].tensors.items():
                if each.layout != torch.strided or each.is_quantized or each.is_meta or key in tensors:
                    raise InputError(f"{one_line(key)} is stored twice, or is not a dense tensor")
                tensors[key] = each.detach().clone(memory_format=torch.contiguous_format)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        owner = found[name].owner
        facts = {"chosen": name, "found": list(found)[:LISTED], "module": None if owner is None else owner.facts()}
    return tensors, facts


def main(request: str) -> int:
    """Read the files of a request and write WEIGHTS and FACTS; returns the exit code.

    request: JSON with files, out (a folder), weights (a name or null) and ema. Errors are written to FACTS.
    """
    given = json.loads(request)
    out = Path(given["out"])
    try:
        tensors, facts = converted([Path(each) for each in given["files"]], given["weights"], ema=given["ema"])
    except InputError as error:
        (out / FACTS).write_text(json.dumps({"error": str(error)}))
        return EXIT_INPUT
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    (out / FACTS).write_text(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
