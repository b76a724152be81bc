"""`distill convert`: makes a folder with safetensors from a pickled checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.common import near
from distill.core.collection import importing
from distill.core.printing import say
from distill.core.text import one_line


def convert(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .bin, .ckpt, .pt or .pth file, or a .pkl file of EDM.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to create.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Folder with the config.json of the network; by default, that of FILE."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Name of the state dict to convert, if FILE contains several.")
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="If FILE contains several state dicts, convert the averaged weights (EMA).")
    ] = False,
) -> None:
    """Convert a pickled checkpoint that you trust to a folder with safetensors, for teacher.path.

    Pickled files can contain programs. FILE is read in a separate process, which runs none of them, but this is no
    complete protection: convert only files from a source that you trust. No other command reads pickled files.
    """
    with importing():
        from distill.convert import conversion

    done = conversion.convert(file, folder, config, weights, ema=ema)
    what = f"'{one_line(done.chosen)}' of {near(file.absolute())}" if done.chosen else near(file.absolute())
    say(f"converted {what} to {near(folder.absolute())}: {done.network}")
    if others := [one_line(name) for name in done.found if name != done.chosen]:
        say(f"the file also contains {', '.join(others)}; to convert one of these instead: --weights NAME")
    if not done.has_scheduler:
        say(
            "there was no scheduler_config.json to copy, so the noise schedule is not known: set teacher.scheduler or "
            "teacher.prediction"
        )
