"""`distill emoji`: a text-to-image teacher of our own, made offline."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli import export, start, students, work
from distill.cli.common import AnyStoreOption, near, store_path, store_setting, store_source
from distill.core.collection import importing
from distill.core.errors import InputError
from distill.core.printing import say
from distill.runs.run_store import RunPaths

PRESET, FOLDER, TEACHER = "emoji", "emoji-teacher", "teacher"  # FOLDER: also the name under which it is published
SHORT = "short"  # sub-folder of FOLDER
FEW = ["images=640", "export=256", "ema_half_lives=[256]", "optimizer.warmup_images=256"]  # of the stage teach
FEW_STEPS = 40  # of the autoencoder


def emoji(
    short: Annotated[
        bool, typer.Option("--short", help="Train for three minutes only, to try out what uses the teacher.")
    ] = False,
    store: AnyStoreOption = None,
) -> None:
    """From drawings of emoji to a text-to-image pipeline in STORE/emoji-teacher/teacher, in about 90 minutes on a CPU.

    If the store has it as a published student, emoji-teacher, it is pulled; else it is published there. Ctrl-C stops
    the training, and the same command goes on. With --short, the names are emoji-teacher/short and emoji-teacher-short.
    """
    from distill.exchange import transports

    is_remote = transports.is_url(store_setting(store).value)
    runs = Path("runs") if is_remote else store_path(store)
    place = runs.absolute() / FOLDER / (SHORT if short else "")
    name = f"{FOLDER}-{SHORT}" if short else FOLDER
    if not (place / TEACHER).exists() and not _pulled(name, place / TEACHER, store):
        if is_remote:
            raise InputError(
                f"{store_source(store).where} has no published {name}, and cannot be trained into; give a local folder "
                "with --store, and publish what is made there"
            )
        _make(place, runs, short, store)
        _publish(place / TEACHER, runs, name)
    elif not (place / "images").exists():
        with importing():
            from distill.emoji import build
        build.draw(place)
    say(f"the teacher is in {near(place / TEACHER)}")


def _pulled(name: str, folder: Path, store: str | None) -> bool:
    """Whether the store has the teacher as a published student, which is then pulled."""
    from distill.exchange import published

    if not published.listed(store_source(store), name).students:
        return False
    students.pull(name, folder, store=store)
    return True


def _make(place: Path, runs: Path, short: bool, store: str | None) -> None:
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


def _publish(teacher: Path, runs: Path, name: str) -> None:
    from distill.exchange import publishing, student_card

    done = publishing.publish(teacher, runs, name, None, student_card.Publication(name), b"")
    say(f"published {done.entry.label}; get it elsewhere with: distill pull {done.entry.label}")
