"""Patterns of file names with braces, as a shell writes them: {00000..00127} and {a,b}. Does not read the disk."""

import re

from distill.core.errors import InputError
from distill.core.text import printable

MOST = 1_000_000  # names of a pattern
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")


def expanded(pattern: str) -> list[str]:
    """All names of a pattern, in its order. InputError if it is not valid."""
    match = BRACES.search(pattern)
    plain = pattern if match is None else pattern[: match.start()]
    if "{" in plain or "}" in plain:
        raise _bad(pattern, "nested braces, or one without the other")
    if match is None:
        return [pattern]
    if (limits := RANGE.fullmatch(match[1])) is not None:
        first, last = limits[1], limits[2]
        if int(last) < int(first) or int(last) - int(first) >= MOST:
            raise _bad(pattern, f"the range {match[0]}")
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 1
        words = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    elif "," in match[1]:
        words = match[1].split(",")
    else:
        raise _bad(pattern, match[0])
    ends = expanded(pattern[match.end() :])
    if len(ends) * len(words) > MOST:
        raise _bad(pattern, f"more than {MOST:,} names")
    return [plain + word + end for word in words for end in ends]


def _bad(pattern: str, what: str) -> InputError:
    return InputError(
        f"data.path: the pattern {printable(pattern)[:300]} has {printable(what)}; valid: ranges like {{00000..00127}} "
        "and lists like {a,b}"
    )
