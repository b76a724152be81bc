"""Runs commands within the test process: their exit codes and output."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import typer.main

from distill.cli.main import main

typer.main.get_command = functools.cache(typer.main.get_command)  # built once, as in a process of its own


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str


def command(capfd, *args: str) -> Done:
    """`distill ARGS` in this process, its output as text."""
    capfd.readouterr()
    code = main(list(args))
    out, err = capfd.readouterr()
    return Done(code, out, err)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, by relative name: contents of files, None for folders."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in folders:
            found[str((Path(root) / name).relative_to(folder))] = None
        for name in files:
            found[str((Path(root) / name).relative_to(folder))] = (Path(root) / name).read_bytes()
    return found
