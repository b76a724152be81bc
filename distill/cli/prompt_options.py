"""Prompts on the command line: given one by one, or as the lines of a text file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from distill.core.errors import InputError
from distill.core.text import is_text, short

PromptOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="A prompt, for students that take prompts; may be repeated."),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE.txt", help="Text file (UTF-8) with one prompt on each line."),
]


def given(prompts: Sequence[str] | None, file: Path | None) -> list[str]:
    """The prompts of --prompt or --prompts; none if neither is given. InputError if one is empty or not text."""
    if prompts and file is not None:
        raise InputError("--prompt and --prompts cannot be combined; write all prompts into the file")
    if file is not None:
        return of_file(file)
    for each in prompts or []:
        if not each.strip():
            raise InputError("--prompt: a prompt is empty; give some text")
        if not is_text(each) or "\n" in each:
            raise InputError(f"--prompt {short(each)}: contains a control character or a line break; remove it")
    return list(prompts or [])


def of_file(path: Path) -> list[str]:
    """The lines of a file with prompts. InputError if there are none, or if one is empty."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}; give a text file with one prompt on each line"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file (UTF-8); give one prompt on each line") from None
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            what = "is empty" if len(lines) > 1 else "is empty, and there is no other"
            raise InputError(f"{path}: line {number} {what}; give one prompt on each line, and remove empty lines")
        if not is_text(line):
            raise InputError(f"{path}: line {number} contains a control character; remove it")
    return lines
