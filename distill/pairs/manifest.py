"""What a folder of pairs holds: `manifest.json`, which fixes every number of it, and shards of consecutive indices.

Only the data ends are stored. The noise of pair i is drawn again from (seed, i); the manifest's checksum of the first
sixteen proves that it is the same noise. A shard counts once the manifest lists it with its checksum.
"""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from distill import draws
from distill.guard import InputError
from distill.spec import Frozen
from distill.store import shard_path, shard_record, write_json

CHECKED_NOISE = range(16)


class ShardFile(Frozen):
    """A complete shard: pairs [start, stop)."""

    start: int
    stop: int
    size: int
    """bytes"""
    sha256: str


class Manifest(Frozen):
    """Everything that the numbers of a pair set depend on, and its shards."""

    format: Literal[1] = 1
    teacher: str
    """the teacher's description, for people"""
    teacher_digest: str
    solver: str
    steps: int
    nfe: int
    """network calls per pair, guidance counted"""
    guidance_scale: float
    seed: int
    count: int
    block: int
    """samples solved at once"""
    shard: int
    """pairs per file"""
    dtype: Literal["float32", "float16", "bfloat16"]
    """of the stored data"""
    precision: Literal["fp32", "bf16"]
    """of the teacher's networks"""
    shape: tuple[int, ...]
    """of one sample"""
    num_classes: int | None
    """class of pair i: i mod num_classes; null: unconditional"""
    noise_sha256: str
    """of the noise of pairs 0 ... 15, float32, little endian"""
    shards: dict[str, ShardFile] = {}
    done: bool = False

    def layout(self) -> dict[str, range]:
        """Every shard's name and its indices, whether made or not."""
        starts = range(0, self.count, self.shard)
        ranges = (range(start, min(start + self.shard, self.count)) for start in starts)
        return {shard_path(Path(), number).name: indices for number, indices in enumerate(ranges)}

    def part(self, number: int, parts: int) -> dict[str, range]:
        """The layout of one of several processes that share the shards."""
        return dict(list(self.layout().items())[number::parts])

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
    return {name: ShardFile.model_validate_json(at.read_bytes()) for name, at in paths.items() if at.exists()}


def noise_sha256(seed: int, shape: tuple[int, ...]) -> str:
    return hashlib.sha256(draws.sample_noise(seed, CHECKED_NOISE, shape).numpy().astype("<f4").tobytes()).hexdigest()


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
