"""Helpers of several commands: settings such as the store, and output as tables or JSON."""

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.core.errors import InputError
from distill.core.printing import say, say_table
from distill.core.text import expanded, is_text, printable, short, suggest, whole_number
from distill.exchange import transports

StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Folder of the runs; by default $DISTILL_STORE, your config, or ./runs."),
]
AnyStoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Folder or URL of the store; by default $DISTILL_STORE, your config, or ./runs."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TeacherHelp = "A diffusers folder or hub id, a student, RUN/STAGE, or YAML such as '{kind: gaussian, ...}'."
SETTINGS = ("site", "store")


def config_path() -> Path:
    """Path of the user's settings, a YAML file."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")  # noqa: PTH111  (no home: no error)
    return Path(home) / "distill" / "config.yaml"


@dataclass(frozen=True)
class Setting:
    """The value of a setting and its source, like "--store"."""

    value: str
    source: str


def site_setting(option: Path | None) -> Setting:
    """The site file: --site, otherwise $DISTILL_SITE, otherwise `site` of the user's config, otherwise the example."""
    from distill.launch import sites

    if option is not None:
        return Setting(str(option), "--site")
    if os.environ.get("DISTILL_SITE"):
        return Setting(os.environ["DISTILL_SITE"], "$DISTILL_SITE")
    if (configured := configuration().get("site")) is not None:
        return Setting(configured, str(config_path()))
    return Setting(str(sites.EXAMPLE), "the default")


def store_setting(option: str | None) -> Setting:
    """The store: --store, otherwise $DISTILL_STORE, `store` of the user's config, or ./runs. A folder or a URL."""
    if option is not None:
        return Setting(option, "--store")
    if os.environ.get("DISTILL_STORE"):
        return Setting(os.environ["DISTILL_STORE"], "$DISTILL_STORE")
    if (configured := configuration().get("store")) is not None:
        return Setting(configured, str(config_path()))
    return Setting("runs", "the default")


def store_path(option: str | None) -> Path:
    """The store as a local folder. InputError if it is a URL or not usable as a folder."""
    return _folder(store_setting(option))


def store_source(option: str | None) -> transports.RemoteSource:
    """The store, a folder or a URL, for reading."""
    setting = store_setting(option)
    return transports.at(setting.value if transports.is_url(setting.value) else _folder(setting))


def _folder(setting: Setting) -> Path:
    if transports.is_url(setting.value):
        transports.scheme_of(setting.value)
        raise InputError(
            f"the store {transports.shown(setting.value)} (from {setting.source}) is a URL, which works only for "
            "`distill pull` and `distill students`; for this command, give a local folder with --store"
        )
    path = expanded(setting.value)
    if not is_text(str(path.absolute())):  # neither safetensors nor Slurm could use such a path
        raise InputError(
            f"the store {ascii(str(path.absolute()))} (from {setting.source}) contains a control character, or bytes "
            "that are not UTF-8; choose another with --store"
        )
    if path.exists() and not path.is_dir():
        raise InputError(f"the store {path} (from {setting.source}) is a file; name a folder")
    return path


def configuration() -> dict[str, str]:
    """The user's settings: name -> value; empty without a file. InputError if the file is not valid."""
    path = config_path()
    if not path.is_file():
        return {}
    from distill.core import yamltext

    content = yamltext.parse(yamltext.read(path), str(path)) or {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a mapping of settings; valid: {', '.join(SETTINGS)}")
    for key, value in content.items():
        if key not in SETTINGS:
            raise InputError(f"{path}: unknown setting '{short(str(key))}'; {suggest(str(key), SETTINGS)}")
        if value is not None and not is_place(value, key):
            valid = "an absolute path or a URL" if key == "store" else "an absolute path"
            raise InputError(f"{path}: {key}: {short(repr(value))} given; must be {valid}")
    return {key: value for key, value in content.items() if value is not None}


def is_place(value: object, setting: str = "store") -> bool:
    """Whether the value is an absolute path or, for the setting `store`, a URL."""
    if not isinstance(value, str):
        return False
    return (setting == "store" and transports.is_url(value)) or expanded(value).is_absolute()


def read_share(option: str, text: str, first: int) -> tuple[int, int]:
    """Parse I/N, part I of N, and return (index from 0, N). InputError if it is malformed.

    first: the smallest valid I, that is, whether the user counts from 0 or from 1.
    """
    number, count = (whole_number(part) for part in text.partition("/")[::2])
    if number is None or count is None or not first <= number < count + first:
        last = "N" if first == 1 else "N - 1"
        raise InputError(f"{option} {short(text)}: must be I/N with I from {first} to {last}, like {first}/4")
    return number - first, count


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a plain table. right: names of the columns that are right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    say_table(table)


def one_line(text: str) -> str:
    """Text with every unprintable character, including line breaks, replaced by a space; for comments in files."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def check_out(out: Path) -> None:
    """Raise InputError unless the folder --out is writable or can be created. It is not created yet."""
    try:
        existing = next(path for path in [out.absolute(), *out.absolute().parents] if path.exists())
        if not existing.is_dir():
            raise InputError(f"--out {out}: {existing} is a file; name a folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there: {error.strerror}; name another folder") from None


def print_json(content: Any) -> None:  # noqa: ANN401
    """Print JSON. Numbers that are not finite, as a loss may be, become null."""
    say(json.dumps(_finite(content), indent=2, allow_nan=False))


def _finite(content: Any) -> Any:  # noqa: ANN401
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def size(path: Path) -> int:
    """Size of a file, or of all files in a folder, in bytes. Links inside a folder are not counted."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def near(path: Path) -> str:
    """A path for messages: relative if it is inside the current folder."""
    here = Path.cwd()
    shown = path.relative_to(here) if path.is_relative_to(here) and path != here else path
    return str(shown).replace("\n", " ")  # a file name must not be able to add a line to a message
