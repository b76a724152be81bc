"""What a folder of pairs holds: `manifest.json`, which fixes every number of it, and shards of consecutive indices.

The noise of pair i is drawn again from (seed, i), if it is not stored; the manifest's checksum of sixteen all over the
set proves that it is the same noise. A shard counts once the manifest lists it with its checksum.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from distill import draws, pairspec
from distill.guard import InputError
from distill.pairs.numbers import Rounding, Whiteness
from distill.spec import Frozen
from distill.store import shard_path, shard_record, write_json

CHECKED_NOISE = 16


class ShardFile(Frozen):
    """A complete shard: pairs [start, stop)."""

    start: int
    stop: int
    size: int
    """bytes"""
    sha256: str
    rounding: Rounding
    """of the data and states"""
    whiteness: Whiteness | None = None
    """of inverted noise"""


class Manifest(Frozen):
    """Everything that the numbers of a pair set depend on, and its shards."""

    format: Literal[2] = 2
    teacher: str
    """the teacher's description, for people"""
    teacher_digest: str
    solver: str
    steps: int
    nfe: float
    """network calls per pair, guidance counted; of segments on average"""
    guidance_scale: float
    seed: int
    count: int
    block: int
    """samples solved at once"""
    shard: int
    """pairs per file"""
    paths: Literal["backward", "forward", "segments", "trajectories"]
    times: list[float] | None
    """of the states, as the solver's grid has them"""
    data_digest: str | None
    """of the real data that paths begin with"""
    dtype: Literal["float32", "float16", "bfloat16", "uint8"]
    """of the stored data and states"""
    store_noise: bool
    """whether the noise is in the shards, in float32"""
    precision: Literal["fp32", "bf16"]
    """of the teacher's networks"""
    shape: tuple[int, ...]
    """of one sample"""
    num_classes: int | None
    """class of pair i: that of its real data, or i mod num_classes; null: unconditional"""
    noise_sha256: str
    """of the drawn noise of sixteen pairs all over the set, float32, little endian"""
    shards: dict[str, ShardFile] = {}
    done: bool = False

    def layout(self) -> dict[str, range]:
        """Every shard's name and its indices, whether made or not."""
        shards = pairspec.shards(self.count, self.shard)
        return {shard_path(Path(), number).name: indices for number, indices in enumerate(shards)}

    def part(self, number: int, parts: int) -> dict[str, range]:
        """The layout of one of several processes that share the shards."""
        return dict(list(self.layout().items())[number::parts])

    @property
    def rounding(self) -> Rounding:
        """Of the whole set."""
        parts = [(file.stop - file.start, file.rounding) for file in self.shards.values()]
        return Rounding(signal=_mean((n, r.signal) for n, r in parts), error=_mean((n, r.error) for n, r in parts))

    @property
    def whiteness(self) -> Whiteness | None:
        """Of the whole set; None where no noise is inverted."""
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
        """sha256 over all that it says, the checksums of the shards included."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def differences(self, other: "Manifest") -> list[str]:
        """What is not the same in two sets' numbers, "name mine (other's)"."""
        mine, others = (m.model_dump(exclude={"teacher", "shards", "done"}) for m in (self, other))
        return [f"{name} {value} ({others[name]})" for name, value in mine.items() if value != others[name]]

    def save(self, folder: Path) -> None:
        write_json(folder / "manifest.json", self.model_dump(mode="json"))


def read(folder: Path) -> Manifest | None:
    """The folder's manifest; None if there is none, InputError if it is damaged."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(
            f"{path} is damaged or foreign ({place}: {first['msg']}); delete {folder} and make it again"
        ) from error


def records(folder: Path, manifest: Manifest) -> dict[str, ShardFile]:
    """The shards that parts have made and no manifest lists yet."""
    paths = {name: shard_record(folder / name) for name in manifest.layout() if name not in manifest.shards}
    found = {}
    for name, path in paths.items():
        try:
            found[name] = ShardFile.model_validate_json(path.read_bytes())
        except FileNotFoundError:  # not made yet; or listed, and removed, while we looked
            continue
    return found


def noise_sha256(seed: int, count: int, shape: tuple[int, ...]) -> str:
    indices = [count * i // CHECKED_NOISE for i in range(CHECKED_NOISE)]
    return hashlib.sha256(draws.sample_noise(seed, indices, shape).numpy().astype("<f4").tobytes()).hexdigest()


def _mean(parts: Iterable[tuple[int, float]]) -> float:
    """Of numbers, each with how often it counts."""
    weights, values = zip(*parts, strict=True)
    return sum(n * value for n, value in zip(weights, values, strict=True)) / sum(weights)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def foreign(folder: Path, manifest: Manifest) -> list[str]:
    """Names of shards in the folder that are not the manifest's."""
    return sorted(path.name for path in folder.glob("*.safetensors") if path.name not in manifest.layout())


def fault(path: Path, file: ShardFile) -> str | None:
    """What is wrong with a listed shard: "missing", "damaged (...)", or None. Reads all of it."""
    if not path.exists():
        return "missing"
    if (size := path.stat().st_size) != file.size:
        return f"damaged ({size} bytes, not {file.size})"
    return None if file_sha256(path) == file.sha256 else "damaged (its sha256 is not the manifest's)"
