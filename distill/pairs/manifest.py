"""A folder of pairs: `manifest.json`, which determines all values of the pairs, and shards of consecutive indices.

Noise that is not stored is drawn again: that of pair i depends on (seed, i). The manifest has a checksum of the noise
of sixteen pairs from all parts of the set, which shows whether the same noise is drawn. While a set is being made, each
shard has a small file next to it, its record, with its checksum. Once the set is complete, the manifest lists all
shards. A shard is complete once it is listed or has a record.

Manifests and records may come from anybody, so everything that is read from them is validated here.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError, model_validator

from distill.core.atomic import write_json
from distill.core.errors import InputError
from distill.core.field_types import (
    MAX_SHARD,
    MAX_SHARDS,
    MAX_SOLVER_STEPS,
    FrozenModel,
    PairCount,
    ShardPairs,
    SolverSteps,
)
from distill.core.text import printable
from distill.flow import draws
from distill.pairs.numbers import Rounding, Whiteness
from distill.spec.guidancespec import GuidanceSpec
from distill.spec.pairspec import MAX_MANIFEST, Layout
from distill.spec.samplingspec import STORED_BYTES, WITH_STATES
from distill.students.fitted import FittedSolver

CHECKED_NOISE = 16
MAX_RECORD = 1 << 16  # bytes
FEW = 5
ADDED = {"guidance", "weak_digest", "epsilon_scale", "fitted"}  # fields that manifests of earlier versions do not have
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Index = Annotated[int, Field(ge=0, le=MAX_SHARDS * MAX_SHARD)]


class ShardFile(FrozenModel):
    """The entry of a complete shard, which has the pairs start, ..., stop - 1."""

    model_config = ConfigDict(allow_inf_nan=False)

    start: Index
    stop: Index
    size: PositiveInt
    """bytes"""
    sha256: Sha256
    rounding: Rounding
    """error of storing the data and states"""
    whiteness: Whiteness | None = None
    """statistics of inverted noise, if there is any"""


class Manifest(FrozenModel):
    """All settings that the values of a set of pairs depend on, and its shards."""

    model_config = ConfigDict(allow_inf_nan=False)

    format: Literal[2] = 2
    teacher: str
    """description of the teacher, for readers"""
    teacher_digest: str
    solver: str
    steps: SolverSteps
    nfe: NonNegativeFloat
    """network calls per pair, those of guidance included; the average if paths are segments"""
    guidance_scale: NonNegativeFloat
    guidance: GuidanceSpec | None = None
    """how guidance was applied, without the place of the weak model"""
    weak_digest: str | None = None
    """digest of the weak model of autoguidance"""
    epsilon_scale: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    count: PairCount
    block: ShardPairs
    """samples that are solved together"""
    shard: ShardPairs
    """pairs per file"""
    paths: Literal["backward", "forward", "segments", "trajectories"]
    times: Annotated[list[float], Field(min_length=2, max_length=MAX_SOLVER_STEPS + 1)] | None
    """times of the stored states, taken from the solver's grid"""
    data_digest: str | None
    """digest of the real data that paths start from"""
    dtype: Literal["float32", "float16", "bfloat16", "uint8"]
    """of the stored data and states"""
    store_noise: bool
    """whether the noise is in the shards, in float32"""
    precision: Literal["fp32", "bf16"]
    """in which the teacher's networks are called"""
    shape: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=8)]
    """of one sample"""
    num_classes: PositiveInt | None
    """the class of pair i is that of its real data, or i mod num_classes; null: unconditional"""
    noise_sha256: Sha256
    """of the drawn noise of sixteen pairs from all parts of the set, as float32, little endian"""
    fitted: FittedSolver | None = None
    """the solver, if it was fitted to the teacher (solver: bns)"""
    shards: dict[str, ShardFile] = {}
    done: bool = False

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        layout, least = self.layout, math.prod(self.shape) * STORED_BYTES[self.dtype]
        if layout.files > MAX_SHARDS:
            raise ValueError(f"count {self.count:,} in files of {self.shard:,}: more than {MAX_SHARDS:,} files")
        if (self.times is None) == (self.paths in WITH_STATES):
            raise ValueError(f"times must {'' if self.times is None else 'not '}be given with paths: {self.paths}")
        if self.times is not None and not (self.times[0] <= 1 and self.times[-1] >= 0 and _falls(self.times)):
            raise ValueError("times do not decrease from at most 1 to at least 0")
        for name, file in self.shards.items():
            number = layout.number(name)
            if number is None:
                raise ValueError(f"shards: {name[:100]!r} is not a file of this set")
            if (wrong := misfit(layout.indices(number), file)) or file.size < (file.stop - file.start) * least:
                raise ValueError(f"shards: {name} {wrong or f'has {file.size} bytes, too few for its pairs'}")
        return self

    @property
    def layout(self) -> Layout:
        """Which pairs belong in which file, whether or not it exists."""
        return Layout(self.count, self.shard)

    @property
    def rounding(self) -> Rounding:
        """The rounding error of the whole set."""
        parts = [(file.stop - file.start, file.rounding) for file in self.shards.values()]
        return Rounding(signal=_mean((n, r.signal) for n, r in parts), error=_mean((n, r.error) for n, r in parts))

    @property
    def whiteness(self) -> Whiteness | None:
        """The noise statistics of the whole set; None if no noise was inverted."""
        parts = [(file.stop - file.start, file.whiteness) for file in self.shards.values() if file.whiteness]
        if not parts:
            return None
        return Whiteness(
            mean=_mean((n, w.mean) for n, w in parts),
            square=_mean((n, w.square) for n, w in parts),
            neighbours=_mean((n, w.neighbours) for n, w in parts),
        )

    @property
    def digest(self) -> str:
        """sha256 over all fields, including the checksums of the shards. Defaults of `ADDED` are left out."""
        missing = ADDED - self.model_dump(include=ADDED, exclude_defaults=True).keys()
        return hashlib.sha256(self.model_dump_json(exclude=missing).encode()).hexdigest()

    def differences(self, other: "Manifest") -> list[str]:
        """The settings that differ from those of the set `other`, each as "name is X, expected Y"."""
        mine, others = (m.model_dump(exclude={"teacher", "shards", "done"}) for m in (self, other))
        return [
            f"{name} is {'another' if name == 'fitted' else f'{value}, expected {others[name]}'}"
            for name, value in mine.items()
            if value != others[name]
        ]

    def save(self, folder: Path) -> None:
        write_json(folder / "manifest.json", self.model_dump(mode="json"))


def read(folder: Path) -> Manifest | None:
    """The folder's manifest, or None if there is none. InputError if it is damaged."""
    path, onward = folder / "manifest.json", f"delete {folder} and make the pairs again"
    content, wrong = _content(path, MAX_MANIFEST)
    if wrong:
        raise InputError(f"{path} {wrong}; {onward}")
    try:
        return None if content is None else Manifest.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise InputError(f"{path} is damaged or was not written by distill ({_first(error)}); {onward}") from None


def records(folder: Path, layout: Layout) -> tuple[dict[str, ShardFile], dict[str, str]]:
    """The entries of shards that have a valid record, and what is wrong with invalid records, by the shard's name."""
    found, faults = dict[str, ShardFile](), dict[str, str]()
    for path in sorted(folder.glob("shard-*.json")):
        name = path.with_suffix(".safetensors").name
        number = layout.number(name)
        content, wrong = _content(path, MAX_RECORD)
        if number is None or (content is None and not wrong):  # another process has just completed the set
            continue
        try:
            file = None if content is None else ShardFile.model_validate_json(content, strict=True)
            wrong = wrong if file is None else misfit(layout.indices(number), file)
        except ValidationError as error:
            file, wrong = None, f"is damaged ({_first(error)})"
        if wrong:
            faults[name] = f"{path} {wrong}"
        elif file is not None:
            found[name] = file
    return found, faults


def misfit(indices: range, file: ShardFile) -> str:
    """What is wrong if the entry of a shard does not have exactly the pairs `indices`; "" if it has."""
    fits = (file.start, file.stop) == (indices.start, indices.stop)
    return "" if fits else f"has pairs {file.start} to {file.stop}, not {indices.start} to {indices.stop}"


def _falls(times: list[float]) -> bool:
    return all(t > s for t, s in pairwise(times))


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


def noise_sha256(seed: int, count: int, shape: tuple[int, ...]) -> str:
    """sha256 of the drawn noise of `CHECKED_NOISE` pairs from all parts of a set of `count` pairs."""
    indices = [count * i // CHECKED_NOISE for i in range(CHECKED_NOISE)]
    return hashlib.sha256(draws.sample_noise(seed, indices, shape).numpy().astype("<f4").tobytes()).hexdigest()


def _mean(parts: Iterable[tuple[int, float]]) -> float:
    """The weighted mean of (weight, value) pairs."""
    weights, values = zip(*parts, strict=True)
    return sum(n * value for n, value in zip(weights, values, strict=True)) / sum(weights)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def few(what: Sequence[str]) -> str:
    """The first `FEW` of the strings and how many more there are, for a message."""
    more = f", and {len(what) - FEW:,} more" if len(what) > FEW else ""
    return printable(", ".join(what[:FEW]) + more)


def foreign(folder: Path, manifest: Manifest) -> list[str]:
    """Names of shards in the folder that do not belong to the manifest's set."""
    names = (path.name for path in folder.glob("*.safetensors"))
    return sorted(name for name in names if manifest.layout.number(name) is None)


def fault(path: Path, file: ShardFile) -> str | None:
    """What is wrong with a shard, e.g. "missing" or "damaged (...)"; None if nothing is. Reads the whole file."""
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            return "not a file"
        if status.st_size != file.size:
            return f"damaged ({status.st_size} bytes, expected {file.size})"
        return None if file_sha256(path) == file.sha256 else "damaged (checksum mismatch)"
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return f"not readable ({error.strerror})"
