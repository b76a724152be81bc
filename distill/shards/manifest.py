"""The files of a set: `manifest.json`, which determines all values of the set, and shards of consecutive items.

While a set is being made, each shard has a small file next to it, its record, with its checksum. Once the set is
complete, the manifest lists all shards. A shard is complete once it is listed or has a record.

Manifests and records may come from anybody, so everything that is read from them is validated here.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any, Generic, Protocol, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError

from distill.core.errors import InputError
from distill.core.field_types import MAX_SHARD, MAX_SHARDS
from distill.core.text import printable
from distill.spec.layout import MAX_MANIFEST, Layout

MAX_RECORD = 1 << 16  # bytes
FEW = 5
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ItemIndex = Annotated[int, Field(ge=0, le=MAX_SHARDS * MAX_SHARD)]


class ShardEntry(Protocol):
    """What a record or a manifest says about a complete shard, which has the items start, ..., stop - 1."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def size(self) -> int: ...  # bytes
    @property
    def sha256(self) -> str: ...
    def model_dump_json(self) -> str: ...


class SetManifest(Protocol):
    """All settings that the values of a set depend on, and its shards."""

    @property
    def layout(self) -> Layout: ...
    @property
    def shards(self) -> Mapping[str, Any]: ...  # the entries of complete shards, by name
    @property
    def done(self) -> bool: ...
    def with_shards(self, shards: Mapping[str, Any], done: bool) -> Self: ...  # their order is that of their names
    def differences(self, other: Self) -> list[str]: ...  # the settings that differ, as "name is X, expected Y"
    def save(self, folder: Path) -> None: ...


M = TypeVar("M", bound=SetManifest)
E = TypeVar("E", bound=ShardEntry)


@dataclass(frozen=True)
class SetKind(Generic[M, E]):
    """A kind of sets.

    items: what a set consists of, for messages, such as "pairs". manifest, entry: the pydantic models of its files.
    others: names of further safetensors files that belong to a set. shared: whether processes of different runs may
    make the same set at the same time; their files have the same bytes.
    """

    items: str
    manifest: type[M]
    entry: type[E]
    others: frozenset[str] = frozenset()
    shared: bool = False


def read(kind: SetKind[M, E], folder: Path) -> M | None:
    """The manifest of the set in `folder`, or None if there is none. InputError if it is damaged."""
    path, onward = folder / "manifest.json", f"delete {folder} and make it again"
    content, wrong = _content(path, MAX_MANIFEST)
    if wrong:
        raise InputError(f"{path} {wrong}; {onward}")
    try:
        return None if content is None else _parsed(kind.manifest, content)
    except ValidationError as error:
        raise InputError(f"{path} is damaged or was not written by distill ({_first(error)}); {onward}") from None


def records(kind: SetKind[M, E], folder: Path, layout: Layout) -> tuple[dict[str, E], dict[str, str]]:
    """The entries of shards that have a valid record, and what is wrong with invalid records, by the shard's name."""
    found, faults = dict[str, E](), dict[str, str]()
    for path in sorted(folder.glob("shard-*.json")):
        name = path.with_suffix(".safetensors").name
        file, wrong = record(kind, path, layout)
        if wrong:
            faults[name] = wrong
        elif file is not None:
            found[name] = file
    return found, faults


def record(kind: SetKind[M, E], path: Path, layout: Layout) -> tuple[E | None, str]:
    """(the entry in a record, what is wrong with it). (None, "") if there is no record, or it belongs to no shard."""
    number = layout.number(path.with_suffix(".safetensors").name)
    content, wrong = _content(path, MAX_RECORD)
    if number is None or (content is None and not wrong):  # another process has just completed the set
        return None, ""
    file = None
    try:
        if content is not None:
            file = _parsed(kind.entry, content)
            wrong = misfit(kind.items, layout.indices(number), file)
    except ValidationError as error:
        wrong = f"is damaged ({_first(error)})"
    return (None, f"{path} {wrong}") if wrong else (file, "")


def misfit(items: str, indices: range, file: ShardEntry) -> str:
    """What is wrong if the entry of a shard does not have exactly the items `indices`; "" if it has."""
    fits = (file.start, file.stop) == (indices.start, indices.stop)
    return "" if fits else f"has {items} {file.start} to {file.stop}, not {indices.start} to {indices.stop}"


def check(items: str, layout: Layout, shards: Mapping[str, ShardEntry], item_bytes: int) -> None:
    """Check the entries of a manifest, for its validator. ValueError if one does not belong to the set.

    item_bytes: bytes of an item, at least.
    """
    if layout.files > MAX_SHARDS:
        raise ValueError(f"count {layout.count:,} in files of {layout.shard:,}: more than {MAX_SHARDS:,} files")
    for name, file in shards.items():
        number = layout.number(name)
        if number is None:
            raise ValueError(f"shards: {name[:100]!r} is not a file of this set")
        wrong = misfit(items, layout.indices(number), file)
        if wrong or file.size < (file.stop - file.start) * item_bytes:
            raise ValueError(f"shards: {name} {wrong or f'has {file.size} bytes, too few for its {items}'}")


def foreign(kind: SetKind[M, E], folder: Path, layout: Layout) -> list[str]:
    """Names of shards in the folder that do not belong to the set."""
    names = (path.name for path in folder.glob("*.safetensors"))
    return sorted(name for name in names if layout.number(name) is None and name not in kind.others)


def fault(path: Path, file: ShardEntry, *, content: bool = True) -> str | None:
    """What is wrong with a shard, e.g. "missing" or "damaged (...)"; None if nothing is.

    content: also read the whole file and compare its checksum.
    """
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            return "not a file"
        if status.st_size != file.size:
            return f"damaged ({status.st_size} bytes, expected {file.size})"
        return None if not content or file_sha256(path) == file.sha256 else "damaged (checksum mismatch)"
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return f"not readable ({error.strerror})"


def complete(kind: SetKind[M, E], folder: Path) -> M:
    """The manifest of a complete set in a cache. InputError if there is none, or if it is not complete."""
    manifest = read(kind, folder)
    if manifest is None:
        raise InputError(f"{folder} contains no {kind.items} (no manifest.json); run `distill cache` to make them")
    files = manifest.layout.files
    if not manifest.done or len(manifest.shards) < files:
        raise InputError(
            f"{folder} is incomplete: {made(kind, folder, manifest)} of {files} shards exist; run `distill cache` "
            "again to finish it"
        )
    return manifest


def refuse_faults(folder: Path, wrong: Sequence[str]) -> None:
    """InputError if anything is wrong with the files of a cache. wrong: see `faults`."""
    if wrong:
        raise InputError(
            f"{folder}: {few(wrong)}; delete unknown files, then run `distill cache`: missing and damaged ones are "
            "made again"
        )


def faults(
    kind: SetKind[M, E], folder: Path, manifest: M, part: tuple[int, int] | None = None, *, content: bool = True
) -> list[str]:
    """What is wrong with the shards of a part of a complete set, and with other files of the folder.

    part: see `Layout.part`; part (0, n) also finds shards that do not belong to the set. content: see `fault`.
    """
    layout, wrong = manifest.layout, list[str]()
    for name in (layout.name(number) for number in layout.part(part)):
        found = fault(folder / name, manifest.shards[name], content=content)
        wrong += [f"{name} is {found}"] if found else []
    if part is None or part[0] == 0:
        wrong += [f"{name} does not belong to this set" for name in foreign(kind, folder, layout)]
    return wrong


def made(kind: SetKind[M, E], folder: Path, manifest: M) -> int:
    """How many shards of a set that is being made are complete."""
    return len(manifest.shards.keys() | records(kind, folder, manifest.layout)[0].keys())


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def few(what: Sequence[str]) -> str:
    """The first `FEW` of the strings and how many more there are, for a message."""
    more = f", and {len(what) - FEW:,} more" if len(what) > FEW else ""
    return printable(", ".join(what[:FEW]) + more)


def mean(parts: Iterable[tuple[int, float]]) -> float:
    """The weighted mean of (weight, value) pairs."""
    weights, values = zip(*parts, strict=True)
    return sum(n * value for n, value in zip(weights, values, strict=True)) / sum(weights)


T = TypeVar("T")


def _parsed(model: type[T], content: bytes) -> T:
    """Parse a JSON text by a pydantic model. Raises ValidationError."""
    assert issubclass(model, BaseModel)
    found: T = model.model_validate_json(content, strict=True)
    return found


def _first(error: ValidationError) -> str:
    """The first error, with its place, for a message."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))[:200] or "the file"
    return printable(f"{place}: {first['msg'].removeprefix('Value error, ')}").replace("\n", " ")


def _content(path: Path, limit: int) -> tuple[bytes | None, str]:
    """The bytes of a file (None if it does not exist or cannot be read), and what is wrong with it ("": nothing).

    Only regular files are read: reading a pipe could block forever.
    """
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            return None, "is not a file"
        if status.st_size > limit:
            return None, f"has {status.st_size:,} bytes, at most {limit:,} are expected"
        return path.read_bytes(), ""
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"
