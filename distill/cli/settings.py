"""`distill config`: shows the user's settings with their sources, or changes one."""

import re
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.common import SETTINGS, config_path, configuration, site_setting, store_setting
from distill.cli.runs import print_rows
from distill.core.errors import InputError
from distill.core.printing import say
from distill.core.text import expanded, is_text, suggest
from distill.exchange import transports


def config(
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help=f"One of: {', '.join(SETTINGS)}.")] = None,
    value: Annotated[
        str | None, typer.Argument(metavar="[VALUE]", help="store: a folder, or a URL to pull from; site: a file.")
    ] = None,
) -> None:
    """Show the settings, or set one in the user's config file."""
    if key is not None and key not in SETTINGS:
        raise InputError(f"there is no setting '{key}'; {suggest(key, SETTINGS)}")
    if value is not None:
        assert key is not None
        say(f"{key}: {_shown(_set(key, value))}, in {config_path()}")
        return
    found = {"site": site_setting(None), "store": store_setting(None)}
    rows = [[name, _shown(each.value), each.source] for name, each in found.items()]
    print_rows(["setting", "value", "from"], rows, letters=4096)  # long enough for a whole path


def _shown(value: str) -> str:
    """A setting for messages: a URL is shown without its password."""
    return transports.shown(value) if transports.is_url(value) else value


def _set(key: str, value: str) -> str:
    """Validate and write a setting, and return its value. Other lines of the file, including comments, are kept."""
    from distill.core import yamltext
    from distill.core.atomic import write_atomic
    from distill.launch import sites

    if not is_text(value):
        raise InputError(f"{key}: {ascii(value)} contains a control character, or bytes that are not UTF-8")
    if key == "site":
        value = str(expanded(value).absolute())
        sites.load(Path(value))  # raises if it is not a valid site file
    elif transports.is_url(value):
        transports.at(value)  # raises if it is not a valid URL
    else:
        value = str(expanded(value).absolute())
        if Path(value).exists() and not Path(value).is_dir():
            raise InputError(f"{key}: {value} is a file; name a folder or a URL")
    configuration()  # raises if the existing file is not valid
    path = config_path()
    lines = path.read_text().splitlines() if path.is_file() else []
    line = yamltext.dump({key: value}).strip()
    kept = [each for each in lines if not re.match(rf"{key}\s*:", each)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "\n".join([*kept, line]) + "\n")
    return value
