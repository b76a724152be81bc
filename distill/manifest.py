"""What a student folder may hold, judged before any of it is used: its distill.json comes from anywhere, and so do its
files. Pure: bytes and names in, InputError out. What is refused is named.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from distill import card as cards
from distill.card import StudentCard
from distill.guard import InputError

MAX_CARD, MAX_JSON, MAX_FILES = 4 << 20, 64 << 20, 1000  # bytes, bytes, files
MAX_HEADER = 100 << 20  # bytes of a safetensors file that describe its tensors
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")  # one name within a path
KINDS = (".safetensors", ".json", ".py", ".md", ".png", ".txt")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib", ".pyc")
LIBRARIES = ("diffusers", "transformers", None)  # whose classes a model_index.json may name


def parse(content: bytes, where: str) -> StudentCard:
    """The card of a distill.json, once every name in it may stand in a student folder."""
    card = cards.parse(content, where)
    if len(card.files) > MAX_FILES:
        raise InputError(f"{where} lists {len(card.files):,} files; a student has at most {MAX_FILES:,}")
    seen: dict[str, str] = {}
    for name in card.files:
        if reason := _objection(name):
            raise InputError(f"{where} lists {name!r}, {reason}; it is refused and nothing of it was kept")
        folded = name.casefold()
        if folded in seen:
            raise InputError(f"{where} lists both {seen[folded]!r} and {name!r}, one file on some disks; it is refused")
        seen[folded] = name
    for name in seen:
        for above in Path(name).parents:
            if above.as_posix() in seen:
                raise InputError(f"{where} lists {seen[above.as_posix()]!r} as a file and as a folder; it is refused")
    return card


def _objection(name: str) -> str | None:
    """Why a file of this name may not stand in a student folder."""
    parts = name.split("/")
    suffix = Path(parts[-1]).suffix.lower()
    if name.startswith(("/", "\\")) or ":" in name:
        return "an absolute path"
    if ".." in parts:
        return "a path that leads out of the folder"
    if not all(PART.fullmatch(part) for part in parts) or len(parts) > 8:
        return "no plain name: letters, digits, '.', '_' and '-', none hidden"
    if name == cards.FILE_NAME:
        return "which is the list itself"
    if suffix in PICKLES:
        return "a pickle or compiled file, which may run anything when it is loaded"
    return None if suffix in KINDS else f"a kind of file that no student has (valid: {', '.join(KINDS)})"


def refuse_strange(found: Collection[str], card: StudentCard, where: str) -> None:
    """InputError if a folder holds files that its distill.json does not list."""
    strange = sorted(set(found) - card.files.keys() - {cards.FILE_NAME})
    if strange:
        raise InputError(
            f"{where}: {', '.join(strange)} is not listed in {cards.FILE_NAME}; remove what does not belong there"
        )


@cache
def shipped() -> Mapping[str, Collection[str]]:
    """File name -> sha256 of every version of it that this project has shipped."""
    found: dict[str, list[str]] = json.loads((Path(__file__).parent / "students" / "shipped.json").read_bytes())
    return found


def unknown_code(card: StudentCard) -> list[str]:
    """The listed program files that are not, byte for byte, a version that this project has shipped."""
    code = {name: record for name, record in card.files.items() if name.endswith(".py")}
    return sorted(n for n, record in code.items() if record.sha256 not in shipped().get(n.rpartition("/")[2], ()))


def refuse_unknown_code(card: StudentCard, where: str) -> None:
    """InputError if the student brings code of its own."""
    unknown = unknown_code(card)
    if unknown:
        raise InputError(
            f"{where} brings code that distill has never shipped: {', '.join(unknown)}; it would run when the student "
            "is loaded. If you trust whoever made it, --trust-code shows the code and takes it"
        )


def refuse_content(folder: Path, card: StudentCard) -> None:
    """InputError if a file whose bytes are as listed is not what its name says, or leads to code elsewhere."""
    for name, record in card.files.items():
        path = folder / name
        if name.endswith(".safetensors"):
            with path.open("rb") as file:
                head = file.read(9)
            length = int.from_bytes(head[:8], "little")
            if len(head) < 9 or head[8:] != b"{" or length > min(record.size - 8, MAX_HEADER):
                raise InputError(f"{name} is no safetensors file; the student is refused")
        elif name.endswith(".json"):
            if record.size > MAX_JSON:
                raise InputError(f"{name} has {record.size:,} bytes, too many for JSON; the student is refused")
            _refuse_json(name, path.read_bytes(), card)


def _refuse_json(name: str, content: bytes, card: StudentCard) -> None:
    try:
        parsed: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON ({error}); the student is refused") from None
    if isinstance(parsed, dict) and "auto_map" in parsed:
        raise InputError(f"{name} names code of another place (auto_map); the student is refused")
    if name != "model_index.json":
        return
    if not isinstance(parsed, dict):
        raise InputError(f"{name} holds no JSON object; the student is refused")
    for part, value in parsed.items():
        if part == "_class_name":
            own = isinstance(value, list) and len(value) == 2 and f"{value[0]}.py" in card.files
            known = isinstance(value, str) or own
        elif part.startswith("_") or not isinstance(value, list):
            known = True
        else:
            known = len(value) == 2 and (value[0] in LIBRARIES or f"{part}/{value[0]}.py" in card.files)
        if not known:
            raise InputError(f"{name}: {part} is {json.dumps(value)}, code that is not the student's; it is refused")


def digest(content: bytes) -> str:
    """Of a student: the sha256 of its distill.json, which has those of all other files."""
    return hashlib.sha256(content).hexdigest()
