"""A folder with the embeddings of prompts: `manifest.json`, shards of consecutive prompts, and the unconditional row.

A shard is a safetensors file with a tensor FIELD [n, ...] for each of the network's arguments, as long as its longest
prompt. `null.safetensors` has the row of the unconditional call. See `shards.manifest` for the files of a set.
"""

import hashlib
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor

from distill.core.atomic import write_json
from distill.core.field_types import FrozenModel, PairCount, ShardPairs
from distill.core.regular_files import open_regular
from distill.shards import LatestShards, mapped
from distill.shards import manifest as files
from distill.shards.manifest import ItemIndex, SetKind, Sha256
from distill.spec.cachespec import MAX_NEGATIVE
from distill.spec.layout import Layout

NULL_FILE = "null.safetensors"
OPEN = 1024  # shards that are open at a time: the prompts of a batch can be in as many shards as it has images
TYPES = {str(each).removeprefix("torch."): each for each in (
    torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
)}  # fmt: skip
RowSide = Annotated[int, Field(ge=0, le=1 << 24)]
RowShape = Annotated[tuple[RowSide, ...], Field(max_length=8)]
FieldName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")]
ByField = Annotated[dict[FieldName, RowShape], Field(min_length=1, max_length=64)]
TypeName = Literal["float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]


class PromptShard(FrozenModel):
    """The entry of a complete shard, which has the prompts start, ..., stop - 1."""

    start: ItemIndex
    stop: ItemIndex
    size: PositiveInt
    """bytes"""
    sha256: Sha256
    rows: ByField
    """shape of a row, by field"""


class PromptManifest(FrozenModel):
    """All settings that the embeddings of a set of prompts depend on, and its shards."""

    model_config = ConfigDict(allow_inf_nan=False)

    format: Literal[1] = 1
    kind: Literal["prompts"] = "prompts"
    encoder_digest: Sha256
    """of the files of the text encoders and tokenizers, see `encoder_files`"""
    prompts_digest: Sha256
    """of the prompts and their order"""
    negative: Annotated[str, Field(max_length=MAX_NEGATIVE)]
    """prompt of the unconditional row"""
    encoder_dtype: Literal["float32", "float16", "bfloat16"]
    dtypes: Annotated[dict[FieldName, TypeName], Field(min_length=1, max_length=64)]
    """data type of each field"""
    count: PairCount
    block: ShardPairs
    """prompts that are encoded together"""
    shard: ShardPairs
    """prompts per file"""
    null_rows: ByField
    """shape of the unconditional row, by field"""
    null_sha256: Sha256
    shards: dict[str, PromptShard] = {}
    done: bool = False

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.null_rows.keys() != self.dtypes.keys():
            raise ValueError("null_rows and dtypes have different fields")
        files.check("prompts", self.layout, self.shards, 0)
        for name, file in self.shards.items():
            least = sum(
                math.prod(shape) * TYPES[self.dtypes.get(key, "bool")].itemsize for key, shape in file.rows.items()
            )
            if {key: len(shape) for key, shape in file.rows.items()} != {k: len(s) for k, s in self.null_rows.items()}:
                raise ValueError(f"shards: {name} has other fields than the unconditional row")
            if file.size < (file.stop - file.start) * least:
                raise ValueError(f"shards: {name} has {file.size} bytes, too few for its prompts")
        return self

    @property
    def layout(self) -> Layout:
        """Which prompts belong in which file, whether or not it exists."""
        return Layout(self.count, self.shard)

    @cached_property
    def longest(self) -> dict[str, tuple[int, ...]]:
        """The shape to which all rows are padded, by field: that of the longest of all prompts."""
        shapes = [self.null_rows, *(file.rows for file in self.shards.values())]
        return {name: tuple(map(max, zip(*(each[name] for each in shapes), strict=True))) for name in self.null_rows}

    @property
    def digest(self) -> str:
        """SHA-256 over all fields, including the checksums of the shards."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def with_shards(self, shards: Mapping[str, PromptShard], done: bool) -> Self:
        return self.model_copy(update={"shards": dict(shards), "done": done})

    def differences(self, other: "PromptManifest") -> list[str]:
        """The settings that differ from those of the set `other`, each as "name is X, expected Y".

        The checksum of the unconditional row is none: it depends on the device and the number of threads.
        """
        mine, others = (each.model_dump(exclude={"null_sha256", "shards", "done"}) for each in (self, other))
        return [f"{name} is {value}, expected {others[name]}" for name, value in mine.items() if value != others[name]]

    def save(self, folder: Path) -> None:
        write_json(folder / "manifest.json", self.model_dump(mode="json"))


KIND: SetKind[PromptManifest, PromptShard] = SetKind(
    "prompts", PromptManifest, PromptShard, frozenset({NULL_FILE}), shared=True
)


class ShardedRows:
    """The rows of a complete folder of embeddings. Implements `flow.conditioning.ConditionRows`.

    Only the manifest is in memory. Rows are read from the shards when they are taken, and padded with zeros to the
    shape of the longest.
    """

    def __init__(self, folder: Path, manifest: PromptManifest) -> None:
        self.folder, self.manifest, self.layout = folder, manifest, manifest.layout
        self._shards = LatestShards(self._load, OPEN)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Opens a folder. InputError if it is incomplete, or if a file is missing or has another size."""
        manifest = files.complete(KIND, folder)
        files.refuse_faults(
            folder, [*files.faults(KIND, folder, manifest, content=False), *null_faults(folder, manifest)]
        )
        return cls(folder, manifest)

    @property
    def fields(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (shape, TYPES[self.manifest.dtypes[name]]) for name, shape in self.manifest.longest.items()}

    def __len__(self) -> int:
        return self.manifest.count

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        fields = self.fields
        taken = {name: torch.zeros(len(indices), *shape, dtype=dtype) for name, (shape, dtype) in fields.items()}
        numbers = torch.div(indices, self.manifest.shard, rounding_mode="floor")
        for number in numbers.unique().tolist():
            places = (numbers == number).nonzero().squeeze(1)
            rows = indices[places] - number * self.manifest.shard
            for name, values in self._shards[number].items():
                taken[name][(places, *(slice(side) for side in values.shape[1:]))] = values[rows]
        return taken

    @cached_property
    def null_rows(self) -> dict[str, Tensor]:
        """The unconditional row, [1, ...] by field, padded like the others."""
        found = mapped.load(self.folder / NULL_FILE, self._tensors(1, self.manifest.null_rows))
        padded = {}
        for name, (shape, dtype) in self.fields.items():
            padded[name] = torch.zeros(1, *shape, dtype=dtype)
            padded[name][(slice(None), *(slice(side) for side in found[name].shape[1:]))] = found[name]
        return padded

    def _load(self, number: int) -> dict[str, Tensor]:
        name = self.layout.name(number)
        rows = self.manifest.shards[name].rows
        return mapped.load(self.folder / name, self._tensors(len(self.layout.indices(number)), rows))

    def _tensors(self, count: int, rows: Mapping[str, tuple[int, ...]]) -> mapped.Specs:
        """The dtype and shape of each tensor in a file with `count` rows, by name."""
        return {name: (TYPES[self.manifest.dtypes[name]], (count, *shape)) for name, shape in rows.items()}


def null_faults(folder: Path, manifest: PromptManifest) -> list[str]:
    """What is wrong with the file of the unconditional row."""
    path = folder / NULL_FILE
    try:
        with open_regular(path, follow=True):
            whole = files.file_sha256(path) == manifest.null_sha256
    except OSError as error:
        return [f"{NULL_FILE} cannot be read ({error.strerror})"]
    return [] if whole else [f"{NULL_FILE} is damaged (checksum mismatch)"]
