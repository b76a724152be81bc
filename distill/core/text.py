"""Text for messages: replaces characters that control a terminal, shortens long lines, suggests similar names."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from unicodedata import category

from distill.core.errors import InputError

UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories of characters that must not reach a terminal


def suggest(given: str, valid: Iterable[str]) -> str:
    """The end of an error message: the most similar valid name, if one is similar, and all valid names."""
    names = sorted(valid)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}valid: {', '.join(names)}"


def printable(text: str) -> str:
    """`text` with every character that could control a terminal replaced by U+FFFD. Line breaks and tabs are kept.

    Replaced are control characters (escape sequences begin with one), format characters (some reverse the direction
    of text), lone surrogates (from bytes of a file name that are not UTF-8), and Unicode's line separators.
    """
    if text.isprintable():  # the usual case
        return text
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text  # also common; much faster than the loop below
    return "".join(letter if letter in "\n\t" or category(letter) not in UNSAFE else "\ufffd" for letter in text)


def is_text(text: str) -> bool:
    """Whether it is plain text: encodable as UTF-8, with no control characters except line breaks and tabs."""
    return re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text) is None


def is_line(text: str) -> bool:
    """Whether it is a single line of text that `printable` would not change."""
    return text.isprintable() or (printable(text) == text and {"\n", "\t"}.isdisjoint(text))


def one_line(text: str, limit: int = 100) -> str:
    """Untrusted text as one printable line of at most `limit` characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def short(text: str) -> str:
    """A text shortened for a message: up to 100 characters, or its first 90 and its length."""
    return text if len(text) <= 100 else f"{text[:90]}... ({len(text):,} characters)"


def whole_number(text: str) -> int | None:
    """Parse a non-negative integer of at most 18 ASCII digits; None if the text is not one."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def expanded(path: str | Path) -> Path:
    """A path with a leading ~ or ~USER expanded. Raises InputError if the user's home folder is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise InputError(f"{path}: the home folder of {user} is not known here; write the path in full") from None
