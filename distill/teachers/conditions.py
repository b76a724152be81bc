"""Files with conditions that were computed beforehand, such as embeddings of prompts.

Such a file is a safetensors file. A tensor FIELD [N, ...] has one row for each of N conditions, and null.FIELD [1, ...]
is the row of the unconditional call. Its names are those of the network's arguments. Its metadata may name the digest
of the text encoders that computed them, and the first prompts, for captions of pictures. Others may write a folder of
.npy files instead: FIELD.npy and null.FIELD.npy.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.core import file_checksums
from distill.core.atomic import write_atomic
from distill.core.errors import InputError
from distill.core.regular_files import read_regular
from distill.core.text import one_line
from distill.flow.conditioning import ConditionRows
from distill.flow.draws import sample_noise
from distill.flow.mapped import NPY, MappedArray, MappedRows, arrays
from distill.flow.tensor_bytes import in_safetensors
from distill.shards import manifest
from distill.spec.model import CheckpointTeacher, TeacherSpec
from distill.teachers.read import short, unreadable
from distill.teachers.sharded_rows import KIND, ShardedRows

ENCODER = "distill.encoder"  # name of the digest of the text encoders in the metadata
PROMPTS = "distill.prompts"  # and of the first prompts, a list in JSON
FIRST_PROMPTS = "first_prompts.json"  # the same list beside the shards of a cache
CAPTIONS, CAPTION = 64, 300  # most prompts, and most characters of each
CHECKED = 2**28  # bytes of rows that are checked for NaN before any is used
MANIFEST = "manifest.json"
NULL = "null."  # prefix of the names of the tensors of the unconditional call


@runtime_checkable
class Wanted(Protocol):
    """The shape of a field for one sample, and its data type. See `convention.CondField`."""

    @property
    def shape(self) -> tuple[int | None, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


TOKENS = 77  # of a prompt whose embeddings are not known yet


@dataclass(frozen=True)
class PlannedRows:
    """Stands for the embeddings of `count` prompts that are not encoded yet: all are `row`. Implements `ConditionRows`.

    row: [...] by field.
    """

    row: Mapping[str, Tensor]
    count: int

    @property
    def fields(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (tuple(each.shape), each.dtype) for name, each in self.row.items()}

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        return {name: each.expand(len(indices), *each.shape) for name, each in self.row.items()}


@dataclass(frozen=True)
class ConditionFile:
    """The content of a file with conditions.

    null_rows: [1, ...] by field; None: no unconditional call. digest: SHA-256 of the file. encoder: digest of the text
    encoders that computed the rows, see `encoder_files`; None: not known. prompts: those of the first rows, in one line
    each; empty: not known.
    """

    path: Path
    rows: ConditionRows
    null_rows: Mapping[str, Tensor] | None
    digest: str
    encoder: str | None = None
    prompts: tuple[str, ...] = ()

    def check(self, fields: Mapping[str, Wanted], optional: Mapping[str, Tensor]) -> None:
        """InputError unless the file has these fields, in these shapes. optional: fields that have another source.

        A row of an optional field has the shape and data type of the tensor in `optional`.
        """
        held = self.rows.fields
        missing = [name for name in fields if name not in held and name not in optional]
        unknown = [name for name in held if name not in fields and name not in optional]
        for what, names in {"missing": missing, "unknown": unknown}.items():
            if names:
                raise InputError(
                    f"{self.path} does not fit the teacher's network: {what} {', '.join(map(short, names))}; valid: "
                    f"{', '.join([*fields, *(name for name in optional if name not in fields)])}"
                )
        for name, wanted in {**optional, **fields}.items():
            if name in held:
                self._check(name, *held[name], wanted)
        self._check_lengths(fields)

    def _check_lengths(self, fields: Mapping[str, Wanted]) -> None:
        """InputError unless the sides of any length are equal in all fields: they are the tokens of one prompt."""
        found = {
            name: side
            for name, wanted in fields.items()
            if name in self.rows.fields
            for side, given in zip(self.rows.fields[name][0], wanted.shape, strict=True)
            if given is None
        }
        if len(set(found.values())) > 1:
            raise InputError(
                f"{self.path}: the fields have different numbers of tokens: "
                f"{', '.join(f'{name} {side}' for name, side in found.items())}; valid: the same number in each"
            )

    def _check(self, name: str, found: tuple[int, ...], dtype: torch.dtype, wanted: Wanted) -> None:
        shape = wanted.shape
        if len(found) != len(shape) or any(b is not None and a != b for a, b in zip(found, shape, strict=True)):
            sides = ", ".join("any" if side is None else str(side) for side in shape)
            raise InputError(f"{self.path}: {name} has rows of shape {list(found)}; valid for this network: [{sides}]")
        if dtype.is_floating_point != wanted.dtype.is_floating_point:
            raise InputError(f"{self.path}: {name} has the data type {dtype}; valid: {wanted.dtype}")


def read(path: Path) -> ConditionFile:
    """Opens a file or folder with conditions, of which only the rows that are used are read.

    A folder that `distill cache` has made is opened by `sharded_rows`. InputError if it is damaged, has no rows, or
    values that are not finite. Rows of more than CHECKED bytes are checked only when they are used.
    """
    if (path / MANIFEST).exists():
        opened = ShardedRows.open(path)
        found, prompts = opened.manifest, _captions(path / FIRST_PROMPTS)
        return ConditionFile(path, opened, opened.null_rows, found.digest, found.encoder_digest, prompts)
    if not path.exists():
        raise InputError(
            f"teacher.conditions={path} does not exist; make it with `distill encode TEACHER PROMPTS.txt`, or give a "
            f"folder with FIELD.npy and {NULL}FIELD.npy for each field"
        )
    if path.suffix == NPY:
        raise InputError(
            f"teacher.conditions={path} is one array; give a folder with FIELD{NPY} and {NULL}FIELD{NPY} for each field"
        )
    try:
        tensors = _of_folder(path) if path.is_dir() else arrays(path)
        encoder, prompts = None, tuple[str, ...]()
        if not path.is_dir():
            with safe_open(path, framework="pt") as file:
                encoder = _encoder_in(path, file.metadata())
                prompts = _parsed((file.metadata() or {}).get(PROMPTS, ""))
        digest = _digest(path, tensors)
    except OSError as error:
        raise unreadable(path, error) from error
    rows = {name: each for name, each in tensors.items() if not name.startswith(NULL)}
    null = {name.removeprefix(NULL): each for name, each in tensors.items() if name.startswith(NULL)}
    counts = {each.shape[0] if each.shape else 0 for each in rows.values()}
    if len(counts) != 1 or counts == {0}:
        raise InputError(f"{path} has no rows of conditions, or not the same number in each field; make it again")
    if null and (null.keys() != rows.keys() or any(null[k].shape != (1, *rows[k].shape[1:]) for k in rows)):
        raise InputError(f"{path}: the fields {NULL}* are not one row of each other field; make it again")
    for name, each in rows.items():
        if not each.by_rows:
            raise InputError(
                f"{path}: {short(name)} is in Fortran order, so that taking one row would read the whole file; save it "
                "with np.save(FILE, np.ascontiguousarray(ARRAY))"
            )
    small = sum(each.bytes for each in rows.values()) <= CHECKED
    for name, each in tensors.items():
        if each.dtype.is_floating_point and (small or name.startswith(NULL)) and not each.whole().isfinite().all():
            raise InputError(f"{path} contains NaN or infinity in {short(name)}; make it again")
    null_rows = {name: each.whole() for name, each in null.items()}
    return ConditionFile(path, MappedRows(rows), null_rows or None, digest, encoder, prompts)


def _of_folder(folder: Path) -> dict[str, MappedArray]:
    """The arrays of the .npy files in a folder, by their names without ending. InputError if there are none."""
    found = {path.name.removesuffix(NPY): arrays(path)[""] for path in files(folder)}
    if not found:
        raise InputError(
            f"teacher.conditions={folder} contains no {NPY} files; give a folder with FIELD{NPY} and {NULL}FIELD{NPY} "
            "for each field, or a safetensors file"
        )
    return found


def _digest(path: Path, tensors: Mapping[str, MappedArray]) -> str:
    """SHA-256 of a file, or over the names and contents of the files in a folder."""
    if not path.is_dir():
        return file_checksums.sha256(path)
    content = hashlib.sha256()
    for name, each in tensors.items():
        content.update(f"{name} {file_checksums.sha256(each.path)}\n".encode())
    return content.hexdigest()


def keep_checksums(spec: TeacherSpec | None, store: Path | None, run: Path | None = None) -> None:
    """Keeps the checksums of the conditions of a teacher in a store and a run, so that others need not read the files.

    Raises RunError if they cannot be written to the run. Files that cannot be read are left to `read`.
    """
    if isinstance(spec, CheckpointTeacher) and spec.conditions is not None:
        with suppress(OSError):
            file_checksums.keep(files(Path(spec.conditions)), store, run)


def files(path: Path) -> list[Path]:
    """The files with conditions at a path."""
    return sorted(path.glob(f"[!.]*{NPY}")) if path.is_dir() else [path] if path.is_file() else []


def planned(fields: Mapping[str, Wanted], count: int, tokens: int = TOKENS) -> ConditionFile:
    """Stands for a cache of `count` prompts that is not made yet, so that a network can be called to test it.

    tokens: of each prompt.
    """
    row = {}
    for name, wanted in fields.items():
        shape = tuple(tokens if side is None else side for side in wanted.shape)
        is_drawn = wanted.dtype.is_floating_point and not name.endswith("mask")
        row[name] = sample_noise(0, [0], shape)[0].to(wanted.dtype) if is_drawn else torch.ones(shape).to(wanted.dtype)
    return ConditionFile(Path("the cache"), PlannedRows(row, count), {name: row[name][None] for name in row}, "")


def encoder_of(path: Path) -> str | None:
    """The digest of the text encoders that made a file with conditions; None if it is not known.

    It is also None if the file cannot be read, which `read` reports.
    """
    try:
        if (path / MANIFEST).exists():
            found = manifest.read(KIND, path)
            return None if found is None else found.encoder_digest
        with safe_open(path, framework="pt") as file:
            return _encoder_in(path, file.metadata())
    except (OSError, SafetensorError):
        return None


def _encoder_in(path: Path, metadata: Mapping[str, str] | None) -> str | None:
    """The digest of the text encoders in the metadata of a file; None if there is none."""
    found = (metadata or {}).get(ENCODER)
    if found is not None and not re.fullmatch("[0-9a-f]{64}", found):
        raise InputError(f"{path}: its metadata has {ENCODER}={short(found)}, which is no SHA-256; make it again")
    return found


def captions(prompts: Sequence[str]) -> list[str]:
    """The first prompts, each as one line of limited length."""
    return [one_line(each, CAPTION) for each in prompts[:CAPTIONS]]


def _captions(path: Path) -> tuple[str, ...]:
    try:
        return _parsed(read_regular(path, 1 << 20, follow=True).decode())
    except (OSError, UnicodeDecodeError):
        return ()


def _parsed(text: str) -> tuple[str, ...]:
    """Captions in JSON, as one line each; none if the text is damaged, since they are only shown."""
    try:
        found = json.loads(text) if text else []
    except (ValueError, RecursionError):
        found = []
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        return ()
    return tuple(captions(found))


def write(
    path: Path,
    rows: Mapping[str, Tensor],
    null_rows: Mapping[str, Tensor] | None,
    encoder: str | None = None,
    prompts: Sequence[str] = (),
) -> None:
    """Writes a file with conditions. RunError if it cannot be written; an existing file is replaced.

    encoder: digest of the text encoders. prompts: of the rows; the first of them are stored.
    """
    tensors = {name: each.detach().cpu().contiguous() for name, each in rows.items()}
    tensors |= {NULL + name: each.detach().cpu().contiguous() for name, each in (null_rows or {}).items()}
    known = {ENCODER: encoder} if encoder else {}
    if prompts:
        known[PROMPTS] = json.dumps(captions(prompts))
    write_atomic(path, in_safetensors(tensors, known))
