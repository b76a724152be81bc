"""`distill emoji`: a text-to-image teacher of our own, made offline."""

from typing import Annotated

import typer

from distill.cli import export, start, work
from distill.cli.common import StoreOption, near, store_path
from distill.core.collection import importing
from distill.core.printing import say
from distill.runs.run_store import RunPaths

PRESET, FOLDER, TEACHER = "emoji", "emoji-teacher", "teacher"
SHORT = "short"  # sub-folder of FOLDER
FEW = ["images=640", "export=256", "ema_half_lives=[256]", "optimizer.warmup_images=256"]  # of the stage teach
FEW_STEPS = 40  # of the autoencoder


def emoji(
    short: Annotated[
        bool, typer.Option("--short", help="Train for three minutes only, to try out what uses the teacher.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """From drawings of emoji to a text-to-image pipeline in STORE/emoji-teacher/teacher, in about 90 minutes on a CPU.

    Ctrl-C stops it, and the same command goes on. With --short, the pipeline is in STORE/emoji-teacher/short/teacher.
    """
    runs = store_path(store)
    place = runs.absolute() / FOLDER / (SHORT if short else "")
    if not (place / TEACHER).exists():
        with importing():
            from distill.emoji import build
        time = "three minutes" if short else "90 minutes"
        say(f"makes the emoji teacher in {near(place)}, in about {time} on 2 CPU cores")
        say("Ctrl-C stops it, and the same command goes on")
        build.prepare(place, FEW_STEPS if short else None)
        changes = [f"teacher.path={place / build.UNTRAINED}", f"data.path={place / build.IMAGES}"]
        name = f"{PRESET}-{SHORT}" if short else None
        changes += [f"stages.teach.{each}" for each in FEW] if short else []
        source = start.find(PRESET, changes, name)
        run = RunPaths(runs.absolute() / source.spec.name)
        if run.spec.is_file():
            work.execute(*start.resume(run, source))
        else:
            work.execute(start.begin(runs, source), source.spec, fresh=True)
        export.export(run.name, out=place / TEACHER, whole=True, store=store)
    say(f"the teacher is in {near(place / TEACHER)}")
