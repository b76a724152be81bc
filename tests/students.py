"""Student folders that are made quickly: valid in all checks that do not load a network."""

import json
import random
import shutil
import zlib
from pathlib import Path

from distill.exchange import publishing, student_card
from distill.exchange.published import PublishedVersion
from distill.exchange.student_card import Publication, StudentCard
from distill.students import shipped

PIPELINE = shipped.pipeline("velocity", "euler").encode()
PICTURE = b"\x89PNG\r\n\x1a\n" + b"".join(
    len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    for kind, data in [
        (b"IHDR", bytes([0, 0, 0, 1, 0, 0, 0, 1, 8, 0, 0, 0, 0])),
        (b"IDAT", zlib.compress(b"\0\0")),
        (b"IEND", b""),
    ]
)  # one black pixel
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def card(name: str = "reflow", **fields) -> StudentCard:
    facts = {
        "recipe": "reflow/reflow",
        "spec_digest": "5" * 64,
        "teacher_digest": "7" * 64,
        "num_classes": None,
        "null_class": None,
        "shape": (1, 8, 8),
        "weights": "raw",
        "images": 12_800,
        "metrics": {"FD-digits@1": 12.5, "FD-digits@2": 8.25},
    }
    return StudentCard(**{"name": name, **facts, **fields})


def tensors(size: int, seed: int) -> bytes:
    """A safetensors file of `size` bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size - 128], "data_offsets": [0, size - 128]}}).ljust(120)
    return (120).to_bytes(8, "little") + header.encode() + random.Random(seed).randbytes(size - 128)


def make(folder: Path, *, size: int = 4096, seed: int = 0, files: dict[str, bytes] | None = None, **fields) -> Path:
    """A student whose weights have `size` bytes, and `files` beside them."""
    index = {"_class_name": ["pipeline", "DistilledPipeline"], "unet": ["diffusers", "UNet2DModel"], "sampler": "euler"}
    content = {
        "model_index.json": json.dumps(index).encode(),
        "pipeline.py": PIPELINE,
        "unet/config.json": b'{"_class_name": "UNet2DModel"}',
        WEIGHTS: tensors(size, seed),
        **(files or {}),
    }
    facts = card(**fields)
    content["README.md"] = student_card.readme(facts).encode()
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    relist(folder, facts)
    return folder


def relist(folder: Path, facts: StudentCard) -> None:
    """distill.json for what lies there now."""
    (folder / student_card.FILE_NAME).write_text(
        student_card.to_json(facts.model_copy(update={"files": student_card.record(folder)}))
    )


def edit_card(folder: Path, edit) -> None:
    """distill.json changed by `edit(content)`, and nothing else."""
    content = json.loads((folder / student_card.FILE_NAME).read_text())
    edit(content)
    (folder / student_card.FILE_NAME).write_text(json.dumps(content))


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to, symlinks=True))


def put(student: Path, store: Path, name: str, version: str | None = None, picture: bytes = b"") -> PublishedVersion:
    """Publish a student that no run knows of."""
    about = Publication(name, publishing.PICTURE if picture else "")
    return publishing.publish(student, store, name, version, about, picture).entry
