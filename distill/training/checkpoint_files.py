"""The files of checkpoints: each is a directory that is either complete or absent. It is verified before it is used.

checkpoints/step-00001234/          renamed to this name once all files are on the disk
    network.student.safetensors     one file per group of tensors; if N ranks wrote it, N files NAME.00000-of-0000N
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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch import Tensor

from distill.core import lease
from distill.core.atomic import hidden
from distill.core.errors import RunError

COMPLETE = re.compile(r"step-\d{8,}")
LEFTOVER = re.compile(r"\.?step-\d{8,}\.(tmp|trash)-.+")  # of any process, also from older versions of distill
OF_RANK = re.compile(r"\.\d{5}-of-\d{5}$")  # in the names of files, if several ranks wrote the checkpoint
CHUNK = 1 << 24  # bytes that are hashed and written at once, so that other threads can run in between
RECIPE_GROUP = "recipe"  # name of the group with the recipe's own state


def network_group(network: str) -> str:
    """Name of the group with a network's raw weights."""
    return f"network.{network}"


def optimizer_group(network: str) -> str:
    """Name of the group with the state of a network's optimizer."""
    return f"optimizer.{network}"


def group_of(file: str) -> str:
    """The group of which a file has tensors."""
    return OF_RANK.sub("", file.removesuffix(".safetensors"))


def file_of(group: str, rank: int, size: int) -> str:
    """The file of a group that one of `size` ranks writes."""
    return f"{group}.safetensors" if size == 1 else f"{group}.{rank:05d}-of-{size:05d}.safetensors"


def ema_group(network: str, half_life: float) -> str:
    """Name of the group with a network's averaged weights. half_life: in images."""
    return f"ema.{network}.{float(half_life)!r}"


def length_of_group(group: str) -> float:
    """The half-life or length of the averages in a group that `ema_group` named."""
    return float(group.split(".", 2)[2])


class PieceMeta(BaseModel):
    """Which part of a tensor a file has: elements from `start` on of the flattened tensor, whose shape is `shape`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    start: Annotated[int, Field(ge=0)]
    shape: list[Annotated[int, Field(ge=0)]]


class FileMeta(BaseModel):
    """Expected checksum and size (bytes) of a file, and of which tensors it has only a part."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str
    size: int
    pieces: dict[str, PieceMeta] = {}


class Meta(BaseModel):
    """The content of meta.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1, 2] = 1
    """2: written by several ranks"""
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
        content = self.model_dump(mode="json", exclude={"digest"})
        for file in content["files"].values():
            if not file["pieces"]:
                del file["pieces"]  # so that the digest is that of files of format 1
        text = json.dumps(content, sort_keys=True)
        return self.model_copy(update={"digest": hashlib.sha256(text.encode()).hexdigest()})


class Damaged(Exception):  # noqa: N818  (says why a checkpoint cannot be used; is always caught)
    pass


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, whose files are as they were written."""

    path: Path
    meta: Meta

    def group(self, name: str) -> "GroupReader":
        """The tensors of a group, to be read one by one. RunError if the checkpoint has no such group."""
        files = [file for file in self.meta.files if group_of(file) == name]
        if not files:
            raise RunError(f"checkpoint {self.path} has no '{name}'; it has {self.groups}")
        return GroupReader(self.path, {file: self.meta.files[file].pieces for file in sorted(files)})

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Read the tensors of a group, to the CPU. RunError if the checkpoint has no such group."""
        with self.group(group) as reader:
            return dict(reader)

    @property
    def groups(self) -> str:
        """The names of its groups, for messages."""
        return ", ".join(sorted({group_of(name) for name in self.meta.files}))


class GroupReader(Mapping[str, Tensor]):
    """Reads tensors of a group, each whole or in part, from the files that have it. A context manager.

    As a mapping, it has the whole tensors by name, and reads each when it is asked for.
    shapes: of all tensors of the group, by name.
    """

    def __init__(self, folder: Path, pieces: Mapping[str, Mapping[str, PieceMeta]]) -> None:
        self._stack = ExitStack()
        self.shapes: dict[str, torch.Size] = {}
        self._found: dict[str, list[tuple[int, int, Any]]] = {}  # (first element, number, open file) by tensor
        for file, parts in pieces.items():
            opened = self._stack.enter_context(safe_open(folder / file, "pt"))
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                shape = torch.Size(opened.get_slice(name).get_shape())
                part = parts.get(name)
                self._found.setdefault(name, []).append((0 if part is None else part.start, shape.numel(), opened))
                self.shapes[name] = shape if part is None else torch.Size(part.shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        return self.part(name, 0, self.shapes[name].numel()).view(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # that of Mapping would read the tensor

    def part(self, name: str, start: int, numel: int) -> Tensor:
        """`numel` elements of a flattened tensor from `start` on, on the CPU. RunError if no file has some of them."""
        parts: list[Tensor] = []
        at, end = start, start + numel
        for first, count, file in sorted(self._found[name], key=lambda each: each[0]):
            if first <= at < first + count or (not numel and not count):
                found = file.get_tensor(name).reshape(-1)[at - first : end - first]
                parts.append(found)
                at += found.numel()
        if at != end or not parts:
            raise RunError(f"no file has the elements {at} to {end} of '{name}'; the checkpoint is not complete")
        return parts[0] if len(parts) == 1 else torch.cat(parts)


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


def read_meta(path: Path) -> Meta:
    """The meta.json of a checkpoint. Damaged if it is not as it was written."""
    try:
        meta = Meta.model_validate_json((path / "meta.json").read_bytes())
    except OSError as error:
        raise Damaged(f"meta.json: {error.strerror}") from error
    except ValidationError as error:
        raise Damaged(f"meta.json: {error.errors()[0]['msg']}") from error
    if meta.sealed().digest != meta.digest:
        raise Damaged("meta.json: wrong checksum")
    return meta


def verify(path: Path, meta: Meta, names: Iterable[str]) -> None:
    """Damaged unless these files of a checkpoint are as they were written."""
    for name in names:
        expected = meta.files[name]
        try:
            with (path / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected.size:
                    raise Damaged(f"{name}: {size:,} bytes instead of {expected.size:,}")
                if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                    raise Damaged(f"{name}: wrong checksum")
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from error


def verified(path: Path) -> Checkpoint:
    """A checkpoint whose files are all as they were written. Damaged if not."""
    meta = read_meta(path)
    verify(path, meta, meta.files)
    return Checkpoint(path, meta)
