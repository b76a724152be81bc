"""`distill encode`: embeddings of prompts, for teachers that are conditioned on text."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli import prompt_options
from distill.cli.common import StoreOption, near
from distill.cli.inspect import checkpoint
from distill.core.collection import importing
from distill.core.errors import InputError
from distill.core.printing import say, say_error
from distill.core.space import human
from distill.core.text import suggest

SUFFIX, DTYPES = ".safetensors", ("float32", "bfloat16", "float16")


def encode(
    teacher: Annotated[
        str, typer.Argument(metavar="TEACHER", help="The folder of a diffusers pipeline with its text encoders.")
    ],
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS.txt", help="Text file (UTF-8) with one prompt on each line.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Output file, .safetensors, for teacher.conditions of a spec.")],
    negative: Annotated[str, typer.Option(help="Prompt of the second call of guidance; by default empty.")] = "",
    batch: Annotated[int, typer.Option(help="Prompts per batch.", min=1, max=4096)] = 8,
    dtype: Annotated[
        str, typer.Option(help="Data type of the text encoders: float32, bfloat16 or float16.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    store: StoreOption = None,
) -> None:
    """Encode prompts by the text encoders of a teacher's pipeline, once, so that training needs no text encoder."""
    from distill.cli import arguments

    lines = prompt_options.of_file(prompts)
    spec = checkpoint(teacher, store)
    if out.suffix != SUFFIX:
        raise InputError(f"--out {out}: give the name of a {SUFFIX} file")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: {'is a folder' if out.is_dir() else 'its folder does not exist'}; name a file")
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: {suggest(dtype, DTYPES)}")
    with importing():
        from distill.runs.progress import Progress
        from distill.teachers import checkpoint as checkpoints
        from distill.teachers import conditions, encoding

    encoders = encoding.load(spec, arguments.device(device), checkpoints.DTYPES[dtype])

    def begun(size: int) -> None:
        say_error(f"encode: {out} will have about {human(size)}, and up to three times as much memory is needed")

    with Progress("encode", len(lines), "prompts", None) as progress:
        rows, null = encoders.encode(lines, negative, batch, lambda done: progress.update(done, {}), begun)
    conditions.write(out, rows, null, encoders.digest, lines)
    fields = ", ".join(f"{name} {list(each.shape[1:])}" for name, each in rows.items())
    say(f"wrote {near(out.absolute())}: {len(lines):,} prompts and the unconditional call; {fields}")
    say(f"use it in a spec: teacher: {{path: {teacher}, conditions: {out}}}")
