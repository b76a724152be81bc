"""A folder of pairs: `manifest.json`, which determines all values of the pairs, and shards of consecutive indices.

Noise that is not stored is drawn again: that of pair i depends on (seed, i). The manifest has a checksum of the noise
of sixteen pairs from all parts of the set, which shows whether the same noise is drawn. See `shards.manifest` for the
files of a set.

Manifests and records may come from anybody, so everything that is read from them is validated.
"""

import hashlib
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveInt, model_validator

from distill.core.atomic import write_json
from distill.core.field_types import MAX_SOLVER_STEPS, FrozenModel, PairCount, ShardPairs, SolverSteps
from distill.flow import draws
from distill.pairs.numbers import Rounding, Whiteness
from distill.shards import manifest as files
from distill.shards.manifest import ItemIndex, SetKind, Sha256, mean
from distill.spec.guidancespec import GuidanceSpec
from distill.spec.layout import Layout
from distill.spec.samplingspec import STORED_BYTES, WITH_STATES
from distill.students.fitted import FittedSolver

CHECKED_NOISE = 16
ADDED = {"guidance", "weak_digest", "epsilon_scale", "fitted"}  # fields that manifests of earlier versions do not have


class ShardFile(FrozenModel):
    """The entry of a complete shard, which has the pairs start, ..., stop - 1."""

    model_config = ConfigDict(allow_inf_nan=False)

    start: ItemIndex
    stop: ItemIndex
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
        if (self.times is None) == (self.paths in WITH_STATES):
            raise ValueError(f"times must {'' if self.times is None else 'not '}be given with paths: {self.paths}")
        if self.times is not None and not (self.times[0] <= 1 and self.times[-1] >= 0 and _falls(self.times)):
            raise ValueError("times do not decrease from at most 1 to at least 0")
        files.check("pairs", self.layout, self.shards, math.prod(self.shape) * STORED_BYTES[self.dtype])
        return self

    @property
    def layout(self) -> Layout:
        """Which pairs belong in which file, whether or not it exists."""
        return Layout(self.count, self.shard)

    @property
    def rounding(self) -> Rounding:
        """The rounding error of the whole set."""
        parts = [(file.stop - file.start, file.rounding) for file in self.shards.values()]
        return Rounding(signal=mean((n, r.signal) for n, r in parts), error=mean((n, r.error) for n, r in parts))

    @property
    def whiteness(self) -> Whiteness | None:
        """The noise statistics of the whole set; None if no noise was inverted."""
        parts = [(file.stop - file.start, file.whiteness) for file in self.shards.values() if file.whiteness]
        if not parts:
            return None
        return Whiteness(
            mean=mean((n, w.mean) for n, w in parts),
            square=mean((n, w.square) for n, w in parts),
            neighbours=mean((n, w.neighbours) for n, w in parts),
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

    def with_shards(self, shards: Mapping[str, ShardFile], done: bool) -> Self:
        return self.model_copy(update={"shards": dict(shards), "done": done})

    def save(self, folder: Path) -> None:
        write_json(folder / "manifest.json", self.model_dump(mode="json"))


KIND: SetKind[Manifest, ShardFile] = SetKind("pairs", Manifest, ShardFile)


def read(folder: Path) -> Manifest | None:
    """The folder's manifest, or None if there is none. InputError if it is damaged."""
    return files.read(KIND, folder)


def _falls(times: list[float]) -> bool:
    return all(t > s for t, s in pairwise(times))


def noise_sha256(seed: int, count: int, shape: tuple[int, ...]) -> str:
    """sha256 of the drawn noise of `CHECKED_NOISE` pairs from all parts of a set of `count` pairs."""
    indices = [count * i // CHECKED_NOISE for i in range(CHECKED_NOISE)]
    return hashlib.sha256(draws.sample_noise(seed, indices, shape).numpy().astype("<f4").tobytes()).hexdigest()
