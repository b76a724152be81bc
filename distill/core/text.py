"""Text for people: what a terminal could obey is taken out, long lines are cut, near names are suggested."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from unicodedata import category

from distill.core.errors import InputError

UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories of characters that must not reach a terminal


def suggest(given: str, valid: Iterable[str]) -> str:
    """The end of an error message: the nearest valid name, if any is near, and all of them."""
    names = sorted(valid)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}valid: {', '.join(names)}"


def printable(text: str) -> str:
    """`text` with every character that a terminal could obey replaced by U+FFFD; line breaks and tabs stay.

    These are Unicode's control characters (escape sequences begin with one), its format characters (some reverse the
    direction of text), lone surrogates (bytes of a file name that are not UTF-8), and its own line separators.
    """
    if text.isprintable():  # almost always
        return text
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text  # nearly always, and much faster
    return "".join(letter if letter in "\n\t" or category(letter) not in UNSAFE else "\ufffd" for letter in text)


def is_text(text: str) -> bool:
    """Whether it may be a path, a name or a word: no control characters but line breaks and tabs, all of it UTF-8."""
    return re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text) is None


def is_line(text: str) -> bool:
    """Whether it is one line of text that `printable` leaves as it is."""
    return text.isprintable() or (printable(text) == text and {"\n", "\t"}.isdisjoint(text))


def one_line(text: str, limit: int = 100) -> str:
    """A stranger's text as one line of at most `limit` characters, without what a terminal would obey."""
    line = " ".join(printable(text).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def short(text: str) -> str:
    """At most 100 letters of a text, for a message."""
    return text if len(text) <= 100 else f"{text[:90]}... ({len(text):,} letters)"


def whole_number(text: str) -> int | None:
    """The number written in ASCII digits, at most 18 of them; None where it is none."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def expanded(path: str | Path) -> Path:
    """A path with ~ and ~USER at its beginning filled in; InputError where that user is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise InputError(f"{path}: the home folder of {user} is not known here; write the path in full") from None
