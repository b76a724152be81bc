"""The files of checkpoints: each is a directory that is either complete or absent. It is verified before it is used.

checkpoints/step-00001234/          renamed to this name once all files are on the disk
    network.student.safetensors     one file per group of tensors
    optimizer.student.safetensors
    ema.student.2000.0.safetensors
    meta.json                       step, settings, environment, sha256 and size of every file
checkpoints/.step-00001234.tmp-...  being written or deleted
checkpoints/step-00001234.damaged   damaged, moved aside
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load as from_bytes
from torch import Tensor

from distill.core import lease
from distill.core.atomic import hidden
from distill.core.errors import RunError

COMPLETE = re.compile(r"step-\d{8,}")
LEFTOVER = re.compile(r"\.?step-\d{8,}\.(tmp|trash)-.+")  # of any process, also from older versions of distill
CHUNK = 1 << 24  # bytes that are hashed and written at once, so that other threads can run in between
TensorGroup = tuple[str, Mapping[str, Tensor]]  # name, tensors by name


RECIPE_GROUP = "recipe"  # name of the group with the recipe's own state


def network_group(network: str) -> str:
    """Name of the group with a network's raw weights."""
    return f"network.{network}"


def optimizer_group(network: str) -> str:
    """Name of the group with the state of a network's optimizer."""
    return f"optimizer.{network}"


def ema_group(network: str, half_life: float) -> str:
    """Name of the group with a network's averaged weights. half_life: in images."""
    return f"ema.{network}.{float(half_life)!r}"


class FileMeta(BaseModel):
    """Expected checksum and size (bytes) of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str
    size: int


class Meta(BaseModel):
    """The content of meta.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    step: int
    """number of completed steps"""
    images: int
    settings: dict[str, Any]
    """seed, version of the random draws, spec of the stage, digests of the inputs: they may not change on resume"""
    environment: dict[str, str | int]
    """torch, device, threads, micro-batch, ...: they may change on resume, but results are then not bit-identical"""
    files: dict[str, FileMeta]
    digest: str = ""
    """sha256 over the other fields"""

    def sealed(self) -> "Meta":
        """A copy with the digest of the other fields."""
        content = json.dumps(self.model_dump(mode="json", exclude={"digest"}), sort_keys=True)
        return self.model_copy(update={"digest": hashlib.sha256(content.encode()).hexdigest()})


class Damaged(Exception):  # noqa: N818  (says why a checkpoint cannot be used; is always caught)
    pass


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint."""

    path: Path
    meta: Meta

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Read the tensors of a group, to the CPU. RunError if the checkpoint has no such group."""
        file = self.path / f"{group}.safetensors"
        if file.name not in self.meta.files:
            raise RunError(f"checkpoint {self.path} has no '{group}'; it has {self.groups}")
        return from_bytes(file.read_bytes())

    @property
    def groups(self) -> str:
        """The names of its groups, for messages."""
        return ", ".join(sorted(name.removesuffix(".safetensors") for name in self.meta.files))


def complete(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first; they are not verified."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if COMPLETE.fullmatch(path.name))
    return sorted(found, key=step_of, reverse=True)


def clear(folder: Path) -> None:
    """Remove what a killed process left in a folder of checkpoints."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def remove(path: Path) -> None:
    """Delete a checkpoint. If the process is killed, no part is left under its name."""
    trash = hidden(path)
    path.rename(trash)
    shutil.rmtree(trash)


def step_of(path: Path) -> int:
    """The number of steps before a checkpoint."""
    return int(path.name.removeprefix("step-"))


def store(path: Path, content: bytes | memoryview) -> FileMeta:
    """Write a file to the disk, past all caches. OSError as for writing."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for at in range(0, len(content), CHUNK):
            lease.confirm()
            digest.update(content[at : at + CHUNK])
            file.write(content[at : at + CHUNK])
        file.flush()
        os.fsync(file.fileno())  # reports errors of writing, which close() may not
    return FileMeta(sha256=digest.hexdigest(), size=len(content))


def verified(path: Path) -> Meta:
    """The meta.json of a checkpoint whose files are all as they were written. Damaged if not."""
    try:
        meta = Meta.model_validate_json((path / "meta.json").read_bytes())
    except OSError as error:
        raise Damaged(f"meta.json: {error.strerror}") from error
    except ValidationError as error:
        raise Damaged(f"meta.json: {error.errors()[0]['msg']}") from error
    if meta.sealed().digest != meta.digest:
        raise Damaged("meta.json: wrong checksum")
    for name, expected in meta.files.items():
        try:
            with (path / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected.size:
                    raise Damaged(f"{name}: {size:,} bytes instead of {expected.size:,}")
                if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                    raise Damaged(f"{name}: wrong checksum")
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from error
    return meta
