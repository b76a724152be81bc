"""Checks the distill.json of an untrusted student folder, before any other file is fetched: which files may be in it.

The functions here work on bytes and names only, and raise InputError with the refused name. `contents` checks what is
in the files.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

from distill.core.errors import InputError
from distill.exchange import stock_students, student_card
from distill.exchange.student_card import StudentCard

PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")  # one component of a path
KINDS = (".safetensors", ".json", ".py", ".md", ".png", ".txt")
TOKENIZER_KINDS = (".model", ".jinja")  # only in the folder of a tokenizer, see `contents`
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib", ".pyc")


def parse(content: bytes, where: str) -> StudentCard:
    """The card in a distill.json. InputError if it is invalid, or a name in it is not allowed in a student folder."""
    card = student_card.parse(content, where)
    refuse_files(card, where)
    if card.is_native:
        stock_students.refuse_card(card)
    return card


def refuse_files(card: StudentCard, where: str) -> None:
    """Raise InputError if a card lists a name that is not allowed in a student folder, or one file twice."""
    if sum(record.size for record in card.files.values()) > student_card.LARGEST:
        raise InputError(f"{where} is invalid: it lists more bytes than any disk has")
    seen = {student_card.FILE_NAME: student_card.FILE_NAME}
    for name in card.files:
        if reason := _objection(name):
            shown = repr(name) if len(name) <= 200 else f"{name[:200]!r}..."
            raise InputError(f"{where} is invalid: it lists {shown}, {reason}; nothing was saved")
        folded = name.casefold()
        if folded in seen:
            raise InputError(
                f"{where} is invalid: it lists both {seen[folded]!r} and {name!r}, the same file on some disks"
            )
        seen[folded] = name
    for name in seen:
        for above in Path(name).parents:
            if above.as_posix() in seen:
                raise InputError(f"{where} is invalid: it lists {seen[above.as_posix()]!r} as a file and as a folder")


def is_plain(name: str) -> bool:
    """Whether it is a relative path of plain names: letters, digits, '.', '_' and '-', not hidden."""
    return len(name) <= 2000 and all(PART.fullmatch(part) for part in name.split("/"))


def _objection(name: str) -> str | None:
    """Why a file of this name is not allowed in a student folder; None if it is allowed."""
    parts = name.split("/")
    suffix = Path(parts[-1]).suffix
    if name.startswith(("/", "\\")) or ":" in name:
        return "an absolute path"
    if ".." in parts:
        return "a path that leads out of the folder"
    if not is_plain(name) or len(parts) > 8:
        return "not a valid name (letters, digits, '.', '_' and '-'; not hidden)"
    if name == student_card.FILE_NAME:
        return "which is the list of files itself"
    if suffix.lower() in PICKLES:
        return "a pickle or compiled file, which can run any code when it is loaded"
    return (
        None
        if suffix in (*KINDS, *TOKENIZER_KINDS)
        else f"a file type that students do not have (valid: {', '.join(KINDS)})"
    )


@cache
def shipped() -> Mapping[str, Collection[str]]:
    """File name -> sha256 of each version of the file that distill has shipped."""
    found: dict[str, list[str]] = json.loads((Path(__file__).parents[1] / "students" / "shipped.json").read_bytes())
    return found


def unknown_code(card: StudentCard) -> list[str]:
    """The listed .py files that are not identical to a version that distill has shipped."""
    code = {name: record for name, record in card.files.items() if name.endswith(".py")}
    return sorted(n for n, record in code.items() if record.sha256 not in shipped().get(n.rpartition("/")[2], ()))


def refuse_unknown_code(card: StudentCard, where: str) -> None:
    """Raise InputError if the student contains code that distill has not shipped."""
    unknown = unknown_code(card)
    if unknown:
        raise InputError(
            f"{where} contains code that distill has never shipped: {', '.join(unknown)}; it would run when the "
            "student "
            "is loaded. If you trust its author, --trust-code shows the code and accepts it"
        )


def digest(content: bytes) -> str:
    """sha256 of bytes. The digest of a student is that of its distill.json, which has the sha256 of all other files."""
    return hashlib.sha256(content).hexdigest()
