"""The one place that prints. Whatever it is given comes from files, names and other programs, so what a terminal would
obey (escape sequences, reversed text) is taken out first; see `text.printable`.
"""

import logging
import os
import shutil
import sys
import warnings
from contextlib import suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING

from distill.core.text import printable

if TYPE_CHECKING:
    import rich.console

_format_warning = warnings.formatwarning
_warned: set[str] = set()  # by this process


def say(text: object = "", *, end: str = "\n", flush: bool = False) -> None:
    """Print a text on stdout."""
    print(printable(str(text)), end=end, flush=flush)


def say_error(text: object, *, end: str = "\n") -> None:
    """Print a text on stderr, at once."""
    print(printable(str(text)), end=end, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Say on stderr what must not be missed: once in the life of the process, however often it is found."""
    if text not in _warned:
        _warned.add(text)
        with suppress(OSError):  # the reader may be gone, which is no reason to lose work
            say_error(f"warning: {text}")


def say_table(shown: "rich.console.RenderableType") -> None:
    """Print a table of rich on stdout. Square brackets in it are text, no markup."""
    from rich.segment import Segment, Segments

    out = console()
    parts = (part if part.control else Segment(printable(part.text), part.style) for part in out.render(shown))
    out.print(Segments(parts))


def console(*, stderr: bool = False) -> "rich.console.Console":
    """Where rich prints, for `say_table` and for a line that moves; takes no markup."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else shutil.get_terminal_size((160, 24)).columns  # $COLUMNS, or 160
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False, soft_wrap=False)


def clear() -> None:
    """Empty the terminal; nothing happens where stdout is none."""
    console().clear()


class _Record(logging.LogRecord):
    """A message of a library's log; it may contain text from a file."""

    def getMessage(self) -> str:  # noqa: N802  (logging's name)
        return printable(super().getMessage())


def prepare() -> None:
    """To be called before a command begins: what libraries print is made safe as well, and a closed stdout, or one
    that cannot take every letter, is no trouble.
    """
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = lambda *given: printable(_format_warning(*given))
    if sys.stdout is None:  # closed by who started us
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  (for as long as the process lives)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def abandon() -> None:
    """Print no more on stdout, which cannot be written: otherwise the end of the process would complain of it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
