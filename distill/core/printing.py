"""All printing goes through this module.

Printed text may come from files, names and other programs. Characters that control a terminal (escape sequences,
reversed text) are therefore replaced first; see `text.printable`.
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
_warned: set[str] = set()  # the warnings that this process has printed


def say(text: object = "", *, end: str = "\n", flush: bool = False) -> None:
    """Print a text on stdout."""
    print(printable(str(text)), end=end, flush=flush)


def say_error(text: object, *, end: str = "\n") -> None:
    """Print a text on stderr and flush it."""
    print(printable(str(text)), end=end, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr. The same warning is printed only once per process."""
    if text not in _warned:
        _warned.add(text)
        with suppress(OSError):  # the reader of stderr may have ended; the work continues
            say_error(f"warning: {text}")


def say_table(shown: "rich.console.RenderableType") -> None:
    """Print a rich table on stdout. Square brackets in it are printed as they are, not read as markup."""
    from rich.segment import Segment, Segments

    out = console()
    parts = (part if part.control else Segment(printable(part.text), part.style) for part in out.render(shown))
    out.print(Segments(parts))


def console(*, stderr: bool = False) -> "rich.console.Console":
    """The console of rich, for tables and progress bars. Text is not read as markup."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else shutil.get_terminal_size((160, 24)).columns  # $COLUMNS, or 160
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False, soft_wrap=False)


def clear() -> None:
    """Clear the terminal. Does nothing if stdout is not a terminal."""
    console().clear()


class _Record(logging.LogRecord):
    """A log record whose message is made printable: libraries may log text from files."""

    def getMessage(self) -> str:  # noqa: N802  (logging's name)
        return printable(super().getMessage())


def prepare() -> None:
    """Prepare the process for printing; call it before a command begins.

    Log messages and warnings of libraries become printable too. A closed stdout or stderr is replaced by /dev/null.
    Characters that stdout cannot encode are printed as backslash escapes.
    """
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = lambda *given: printable(_format_warning(*given))
    if sys.stdout is None:  # closed by the parent process
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  (for as long as the process lives)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def abandon() -> None:
    """Redirect stdout to /dev/null once writing to it has failed; otherwise Python reports an error at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
