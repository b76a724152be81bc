"""The files of a set that is stored in shards, such as pairs or a cache. Does not import torch."""

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Protocol, runtime_checkable

from pydantic import BaseModel, ValidationError

from distill.core.field_types import MAX_SHARDS

MAX_MANIFEST = 256 << 20  # bytes; several times the size that MAX_SHARDS files need
SHARD_NAME = re.compile(r"shard-([0-9]{5,15})\.safetensors")


@runtime_checkable
class Divided(Protocol):
    """A stage that makes `count` items in files of `shard` items."""

    @property
    def count(self) -> int: ...
    @property
    def shard(self) -> int: ...


@dataclass(frozen=True)
class Layout:
    """Layout of `count` items in files of `shard` items each; the last file may have fewer.

    buckets: numbers of items whose sum is `count`, if items of different buckets must not be in the same file. The last
    file of each bucket may have fewer items. Empty: all items are in one bucket.

    Everything is computed without building lists of items or files, since a spec's count may be huge before it is
    refused.
    """

    count: int
    shard: int
    buckets: tuple[int, ...] = ()

    @classmethod
    def of(cls, stage: Divided) -> "Layout":
        return cls(stage.count, stage.shard)

    @property
    def files(self) -> int:
        return self._first_files[-1]

    def indices(self, number: int) -> range:
        """Indices of the items in file `number`."""
        bucket = self.bucket(number)
        begin, end = self._first_items[bucket : bucket + 2]
        start = begin + (number - self._first_files[bucket]) * self.shard
        return range(start, min(start + self.shard, end))

    def bucket(self, number: int) -> int:
        """The bucket of the items in file `number`."""
        return bisect_right(self._first_files, number, hi=len(self._first_files) - 1) - 1

    def holding(self, index: int) -> int:
        """The number of the file with the item `index`."""
        bucket = bisect_right(self._first_items, index, hi=len(self._first_items) - 1) - 1
        return self._first_files[bucket] + (index - self._first_items[bucket]) // self.shard

    def name(self, number: int) -> str:
        return shard_path(Path(), number).name

    def number(self, name: str) -> int | None:
        """The number of the file with this name; None if no file of the set has it."""
        match = SHARD_NAME.fullmatch(name)
        number = int(match[1]) if match else self.files
        return number if number < self.files and self.name(number) == name else None

    def part(self, part: tuple[int, int] | None) -> range:
        """The file numbers i, i + n, ... of part (i, n). None: all files."""
        first, step = part or (0, 1)
        return range(first, self.files, step)

    def items(self, files: range) -> int:
        """Number of items in these files."""
        last = (first - 1 for first in self._first_files[1:])
        missing = (self.shard - len(self.indices(number)) for number in last if number in files)
        return len(files) * self.shard - sum(missing)

    @cached_property
    def _first_items(self) -> list[int]:
        """The first item of each bucket, and the number of all items."""
        return list(accumulate(self.buckets or (self.count,), initial=0))

    @cached_property
    def _first_files(self) -> list[int]:
        """The first file of each bucket, and the number of all files."""
        return list(accumulate((-(-count // self.shard) for count in self.buckets or (self.count,)), initial=0))


def excess(layout: Layout, block: int, items: str, field: str) -> str:
    """What is wrong if a set has more than MAX_SHARDS files; "" if it has not. block: of which shards hold a multiple.

    items, field: what the set consists of, and the field of the spec that is `layout.shard`, for the message.
    """
    if layout.files <= MAX_SHARDS:
        return ""
    least = -(-layout.count // (MAX_SHARDS - len(layout.buckets)))
    return (
        f"{field}: {layout.count:,} {items} in files of {layout.shard:,} are {layout.files:,} files, more than "
        f"{MAX_SHARDS:,}; set {field.rpartition('.')[2]} to {-(-least // block) * block} or more"
    )


def shard_path(folder: Path, number: int) -> Path:
    """Path of shard `number` in the folder of a set."""
    return folder / f"shard-{number:05}.safetensors"


def shard_record(shard: Path) -> Path:
    """Path of the record that is written once a shard is complete. The manifest lists all shards in the end."""
    return shard.with_suffix(".json")


class _ListedFile(BaseModel):
    size: int


class _Listing(BaseModel):
    shards: dict[str, _ListedFile]


def made(folder: Path) -> int:
    """The number of shards in a folder that the manifest lists, or that have a record. They are not read."""
    records = (path.with_suffix(".safetensors").name for path in folder.glob("shard-*.json"))
    return len({*(listed(folder) or {}), *records})


def listed(folder: Path) -> dict[str, int] | None:
    """Shard name -> size in bytes, from the manifest in a folder; None if it is missing or damaged.

    Nothing else in the manifest is validated; `shards.manifest.read` does that.
    """
    path = folder / "manifest.json"
    try:
        if not path.is_file() or path.stat().st_size > MAX_MANIFEST:
            return None
        found = _Listing.model_validate_json(path.read_bytes()).shards
    except (OSError, ValidationError):
        return None
    plain = all(Path(name).name == name for name in found)
    return {name: file.size for name, file in found.items()} if plain else None
