"""`distill emoji`: a text-to-image teacher of our own, made offline."""

from distill.cli import export, start, work
from distill.cli.common import StoreOption, near, store_path
from distill.core.collection import importing
from distill.core.printing import say
from distill.runs.run_store import RunPaths

PRESET, FOLDER, TEACHER = "emoji", "emoji-teacher", "teacher"


def emoji(store: StoreOption = None) -> None:
    """From drawings of emoji to a text-to-image pipeline in STORE/emoji-teacher/teacher, in about 90 minutes on a CPU.

    Ctrl-C stops it, and the same command goes on.
    """
    runs = store_path(store)
    place = runs.absolute() / FOLDER
    if not (place / TEACHER).exists():
        with importing():
            from distill.emoji import build
        say(f"makes the emoji teacher in {near(place)}, in about 90 minutes on 2 CPU cores")
        say("Ctrl-C stops it, and the same command goes on")
        build.prepare(place)
        changes = [f"teacher.path={place / build.UNTRAINED}", f"data.path={place / build.IMAGES}"]
        source = start.find(PRESET, changes, None)
        run = RunPaths(runs.absolute() / source.spec.name)
        if run.spec.is_file():
            work.execute(*start.resume(run, source))
        else:
            work.execute(start.begin(runs, source), source.spec, fresh=True)
        export.export(run.name, out=place / TEACHER, whole=True, store=store)
    say(f"the teacher is in {near(place / TEACHER)}")
