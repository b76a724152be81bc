"""Rows of teachers that the store keeps for other evaluations, each with its picture, in STORE/baselines."""

import hashlib
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from distill.core.atomic import write_atomic, write_json
from distill.core.errors import InputError, RunError
from distill.core.png import is_png
from distill.core.records import read_json, read_small
from distill.runs.results import PICTURE_BYTES, Row


@dataclass(frozen=True)
class SharedRow:
    """A row and the PNG file of its first samples."""

    row: Row
    picture: bytes


def share(store: Path, device: torch.device, key: str, row: Row, picture: bytes) -> None:
    """Keeps a row for other evaluations. key: of everything that its values depend on."""
    path = _path(store, device, key)
    with suppress(OSError, RunError):  # without it, other evaluations measure the row again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path.with_suffix(".png"), picture)
        write_json(path, {"key": key, "row": row.model_dump(mode="json")})


def find(store: Path, device: torch.device, key: str) -> SharedRow | None:
    """The row with this key; None if there is none, or if its files are damaged."""
    path = _path(store, device, key)
    if not path.exists():
        return None
    try:
        content, picture = read_json(path), read_small(path.with_suffix(".png"), PICTURE_BYTES)
        row, found = Row.model_validate(content["row"]), content["key"]
    except (OSError, InputError, KeyError, TypeError, ValidationError):
        return None
    return SharedRow(row, picture) if found == key and is_png(picture) else None


def _path(store: Path, device: torch.device, key: str) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.node()
    digest = hashlib.sha256(f"{key} {name}".encode()).hexdigest()  # the speed is that of the device
    return store / "baselines" / f"{digest[:32]}.json"
