"""What commands share: where the store is, and how tables, sizes and JSON are printed."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.guard import InputError, suggest

if TYPE_CHECKING:
    import rich.console

StoreOption = Annotated[
    Path | None,
    typer.Option("--store", help="Folder of the runs. Otherwise $DISTILL_STORE, the user's config, or ./runs."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
SETTINGS = ("store",)


def config_path() -> Path:
    """The user's settings, a YAML file."""
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "distill" / "config.yaml"


def store_path(option: Path | None) -> Path:
    """The store: --store, else $DISTILL_STORE, else `store` of the user's config, else ./runs."""
    if option is not None:
        path, source = option, "--store"
    elif os.environ.get("DISTILL_STORE"):
        path, source = Path(os.environ["DISTILL_STORE"]), "$DISTILL_STORE"
    elif (configured := _configured()) is not None:
        path, source = configured, str(config_path())
    else:
        path, source = Path("runs"), "the default"
    path = path.expanduser()
    if path.exists() and not path.is_dir():
        raise InputError(f"the store {path} (from {source}) is a file; name a folder")
    return path


def _configured() -> Path | None:
    path = config_path()
    if not path.is_file():
        return None
    from distill import yamltext

    content = yamltext.parse(yamltext.read(path), str(path)) or {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: a mapping of settings is expected; valid: {', '.join(SETTINGS)}")
    for key in content:
        if key not in SETTINGS:
            raise InputError(f"{path}: unknown setting '{key}'; {suggest(str(key), SETTINGS)}")
    store = content.get("store")
    if store is None:
        return None
    if not isinstance(store, str) or not Path(store).expanduser().is_absolute():
        raise InputError(f"{path}: store: {store!r} given; must be an absolute path")
    return Path(store)


def console() -> "rich.console.Console":
    """Where tables go."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    return Console(width=width, highlight=False, soft_wrap=False)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """A plain table; columns named in `right` are aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def one_line(text: str) -> str:
    """Text that can stand in a comment of a file: what cannot be printed, line breaks among it, becomes a space."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def check_out(out: Path) -> None:
    """InputError unless the folder --out can be written, or made; nothing is made yet."""
    try:
        existing = next(path for path in [out.absolute(), *out.absolute().parents] if path.exists())
        if not existing.is_dir():
            raise InputError(f"--out {out}: {existing} is a file; name a folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there: {error.strerror}; name another folder") from None


def print_json(content: Any) -> None:  # noqa: ANN401
    """JSON for programs."""
    print(json.dumps(content, indent=2))


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def near(path: Path) -> str:
    """A path as a user would type it: relative where it lies below the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)
