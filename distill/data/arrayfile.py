"""Files that keep what is known about a data set: arrays, and a head with settings, in safetensors format.

They are mapped into memory, so that the processes of a machine share them. Other users may have written them: the head
is validated here, the arrays by the callers.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from distill.core import printing
from distill.core.atomic import write_atomic
from distill.core.errors import RunError
from distill.core.regular_files import open_regular

Head = TypeVar("Head", bound=BaseModel)
Made = TypeVar("Made", bound="Headed")
Arrays = Mapping[str, NDArray[np.generic]]
TYPES = {torch.uint8, torch.int32, torch.int64}


@runtime_checkable
class Headed(Protocol):
    """The content of a file. Equal heads mean equal contents."""

    @property
    def head(self) -> Any: ...  # a BaseModel


def read(path: Path, head: type[Head]) -> tuple[Head, dict[str, NDArray[np.generic]]] | None:
    """The head and the arrays of a file. Returns None if there is none, or if it is damaged or of another version."""
    try:
        open_regular(path).close()  # a FIFO would block
        with safe_open(path, framework="pt") as file:
            found = head.model_validate_json((file.metadata() or {}).get("index", ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, SafetensorError, ValidationError):
        return None
    if not all(each.dtype in TYPES for each in tensors.values()):
        return None
    return found, {name: each.numpy() for name, each in tensors.items()}


def encoded(head: BaseModel, arrays: Arrays) -> bytes:
    """The content of a file."""
    return save(dict(arrays), metadata={"index": head.model_dump_json()})


def write(path: Path, head: BaseModel, arrays: Arrays) -> None:
    """Writes a file atomically. Raises RunError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create {path.parent}: {error.strerror}; nothing was changed") from error
    write_atomic(path, encoded(head, arrays))


def update(
    file: Path,
    store: Path,
    run: Path | None,
    *,
    read: Callable[[Path], Made | None],
    make: Callable[[Made | None], Made],
    write: Callable[[Path, Made], None],
) -> None:
    """Writes a file to the store and the run, unless it is up to date there. See `data.update_index`.

    file: its path relative to a store or a run. make: what is known -> what is known now.
    """
    shared, own = store / file, None if run is None else run / file
    kept = None if own is None else read(own)
    known = kept or read(shared)
    now = make(known)
    if kept is not None and now.head == kept.head:
        return
    if kept is not None or known is None or now.head != known.head:
        try:
            write(shared, now)
        except RunError as error:
            printing.warn(f"{error}; without an index of the data in the store, each new run reads all files again")
    if own is not None:
        write(own, now)
