"""`distill publish`, `students`, `pull` and `verify`: sharing of students.

torch is imported only to export a checkpoint, or to draw samples if no evaluation has drawn any.
"""

import shlex
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli import arguments
from distill.cli.common import (
    AnyStoreOption,
    JsonOption,
    StoreOption,
    near,
    one_line,
    print_json,
    store_path,
    store_source,
)
from distill.cli.runs import print_rows
from distill.core.atomic import hidden_folder
from distill.core.collection import importing
from distill.core.errors import InputError
from distill.core.printing import say, say_error
from distill.core.space import human
from distill.exchange import lora_use, student_card
from distill.runs.run_store import RunPaths

if TYPE_CHECKING:
    import distill.exchange.published
    import distill.exchange.publishing
    import distill.exchange.transports

TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="Print the student's code, and accept it even if it is not code that distill ships."
    ),
]
FEW = 4  # samples of a large network that are drawn for a model card
MANY = 20  # at most this many warnings are printed
WHICH = (
    "RUN: the student of its last train stage, once that is done. RUN/STAGE: the student of this stage. RUN@best: the "
    "student with the smallest distance at the fewest measured steps. RUN@step-N: exported from this checkpoint. Or a "
    "student's folder."
)


def publish(
    student: Annotated[str, typer.Argument(metavar="RUN[@best|@step-N]", help=WHICH)],
    name: Annotated[
        str, typer.Argument(metavar="NAME[:VERSION]", help="By default the next free version: v1, v2, ...")
    ],
    store: StoreOption = None,
) -> None:
    """Publish a student in the store, with a complete model card. Published versions never change."""
    from distill.exchange import published, publishing, student_card

    folder = store_path(store)
    title, version = published.split(name)
    chosen = chosen_student(student, folder)
    if chosen is None:
        raise InputError(
            f"there is no run or student '{student}'; give RUN or RUN/STAGE of {folder}, or a student's folder"
        )
    # An exported checkpoint is as large as the student: it belongs where the student is published, not into /tmp.
    with hidden_folder(folder.absolute() / "publishing") as temporary:
        found = chosen if isinstance(chosen, Path) else _student(chosen, temporary / "student")
        picture = b"" if isinstance(chosen, Path) else publishing.samples(chosen)
        picture = picture or _drawn(found, chosen, temporary / "samples.png")
        shown = publishing.PICTURE if picture else ""
        if isinstance(chosen, Path):
            about = student_card.Publication(title, shown)
        else:
            about = publishing.describe(title, chosen, student_card.read(found).images, shown)
        done = publishing.publish(found, folder, title, version, about, picture)
    if done.skipped:
        say_error(f"warning: {len(done.skipped):,} of the store's students are skipped; to see why: distill students")
    entry, new = done.entry, done.new
    where = near(folder.absolute() / published.REGISTRY / entry.name / entry.version)
    say(f"published {entry.label}: {where}" if new else f"this student is already published: {entry.label}")
    say(f"get it with: distill pull {entry.label}")


def students(store: AnyStoreOption = None, json: JsonOption = False) -> None:
    """List the published students of the store, the newest version last."""
    from distill.exchange import published
    from distill.reports import run_status

    source = store_source(store)
    listed = published.listed(source)
    _warn(listed.skipped)
    found = listed.students
    if json:
        print_json([entry.model_dump(mode="json") for entry in found])
        return
    if not found:
        say(f"no students in {source.where}; publish one: distill publish RUN NAME")
        return
    rows = [
        [e.label, e.recipe, _best(e), human(e.size), e.license or "-", run_status.age(e.published), e.digest[:12]]
        for e in found
    ]
    heads = ["student", "recipe", "measured", "size", "licence", "published", "sha256"]
    print_rows(heads, rows)


def pull(
    given: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A published NAME[:VERSION], else RUN, RUN/STAGE, RUN@best, a folder or a URL."
        ),
    ],
    dest: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="Folder to create; by default named after the student.")
    ] = None,
    trust_code: TrustOption = False,
    store: AnyStoreOption = None,
) -> None:
    """Fetch a student from a store or a URL (file, http(s), ssh, s3, hf) and verify it; an invalid one is not kept."""
    from distill.exchange import pulling

    source, name, digest = _source(given, store)
    folder = dest or Path(name)
    pulled = pulling.pull(source, folder, digest=digest, show=_show if trust_code else None)
    here = near(folder.absolute())
    if pulled.fetched:
        say(
            f"pulled {here}: {human(pulled.fetched)} in {len(pulled.card.files) + 1} files, sha256 {pulled.digest[:12]}"
        )
    else:
        say(f"{here} exists already and is complete: sha256 {pulled.digest[:12]}")
    say(f"use it: {_use(pulled.card, here)}")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A student folder.")],
    trust_code: TrustOption = False,
) -> None:
    """Check a student folder: all files match their checksums, there are no others, and its code is distill's."""
    from distill.exchange import pulling, transports

    if transports.is_url(str(folder)):
        transports.scheme_of(str(folder))
        raise InputError(f"{transports.shown(str(folder))} is a URL; verify takes a folder: pull it first")
    card = pulling.verify(folder, _show if trust_code else None)
    say(f"{near(folder.absolute())} is complete: '{one_line(card.name)}', {len(card.files) + 1} files")


def chosen_student(given: str, store: Path) -> "distill.exchange.publishing.ChosenStudent | Path | None":
    """The student that the user has named: of a run, or a folder outside of runs; None if there is none."""
    from distill.exchange import publishing, transports

    if transports.is_url(given):
        transports.scheme_of(given)
        raise InputError(f"{transports.shown(given)} is a URL; a run, one of its students, or a folder is expected")
    base, at, which = given.rpartition("@") if "@" in given else (given, "", "")
    folder = Path(base)
    if (folder / "distill.json").is_file():
        run = RunPaths(folder.absolute().parent.parent)
        if folder.absolute().parent == run.students and run.spec.is_file():
            return publishing.choose(run, folder.absolute().name, which)
        if at:
            raise InputError(f"'{given}': {base} is a student's folder, so @{which} has no effect; leave it out")
        return folder
    above, _, stage = base.rpartition("/")
    for name, part in ((base, None), (above, stage)):
        for root in (store / name, Path(name)) if name else ():
            if (root / "spec.yaml").is_file():
                return publishing.choose(RunPaths(root.absolute()), part, which)
    return None


def _student(chosen: "distill.exchange.publishing.ChosenStudent", temporary: Path) -> Path:
    """The folder of a run's student. The student of a checkpoint is first exported to `temporary`."""
    folder, stage = chosen.run.student(chosen.stage), chosen.stage
    if chosen.step is None:
        if not (folder / "distill.json").is_file():
            raise InputError(
                f"stage '{stage}' of run '{chosen.run.name}' has no student yet; wait until it is done, or name a "
                f"checkpoint: {chosen.run.name}/{stage}@step-N"
            )
        return folder
    with importing():
        from distill.execution import train_stage
    from distill.runs import todo
    from distill.spec.model import TrainStage

    spec = todo.load_spec(chosen.run)
    each = spec.stages[stage]
    assert isinstance(each, TrainStage)
    train_stage.export_checkpoint(chosen.run, spec, stage, each.export, temporary, chosen.step)
    return temporary


def _drawn(student: Path, chosen: "distill.exchange.publishing.ChosenStudent | Path", out: Path) -> bytes:
    """A picture of samples of a student, as a PNG file. Without torch or its teacher, a message is printed and b"" is
    returned.

    chosen: where it comes from. A student that works on latents is sampled with the teacher of its run.
    """
    from distill.core.regular_files import read_regular
    from distill.exchange import contents, publishing

    card, like = student_card.read(student), None
    if publishing.PICTURE in card.files:  # it was published before
        with suppress(OSError):  # publishing names what is damaged
            return read_regular(student / publishing.PICTURE, contents.MAX_TEXT)
    lacking = "torch is not installed" if find_spec("torch") is None else ""
    if card.is_native and not isinstance(chosen, Path):
        like = arguments.teacher_of_run(chosen.run.student(chosen.stage))
    elif card.is_native and card.pipeline and card.num_classes is not None:
        like = arguments.teacher_of_run(student)
    elif card.is_native:
        unknown = "prompts, which samples need, are" if card.pipeline else "teacher, which samples need, is"
        lacking = lacking or f"outside of a run its {unknown} not known"
    if lacking:
        say_error(f"the model card has no picture of samples: no evaluation has drawn samples, and {lacking}")
        return b""
    from distill.exchange import pulling

    pulling.verify(student, lambda name, text: None)
    with importing():
        from distill.evaluation import sample
        from distill.execution import train_stage

    sample.write_samples(
        student,
        out,
        steps=card.fewest_steps,
        seed=0,
        count=FEW if card.is_native else 64,
        labels=None,
        device=train_stage.CPU,
        like=like,
    )
    return out.read_bytes()


def _source(given: str, store: str | None) -> "tuple[distill.exchange.transports.RemoteSource, str, str | None]":
    """(source, name for its folder, digest or None) of the student to pull. The digest comes from the store's index."""
    from distill.exchange import published, transports

    if transports.is_url(given):
        place = transports.at(given)
        return place, place.where.rstrip("/").rpartition("/")[2].partition("@")[0] or "student", None
    if (Path(given) / "distill.json").is_file():
        return transports.at(Path(given)), Path(given).absolute().name, None
    source = store_source(store)
    here = source.path if isinstance(source, transports.RemoteFolder) else None
    run, _, stage = given.rpartition("/")
    if here is None and run and ":" not in given:
        return source.below(run).below("students").below(stage), f"{run}-{stage}", None
    name = given.partition(":")[0]
    if here is not None and ":" not in given and not (here / published.REGISTRY / name).is_dir():
        chosen = chosen_student(given, here)
        if chosen is None:
            raise InputError(
                f"there is no published student, run or folder '{given}'; give NAME[:VERSION] (distill students lists "
                f"them), RUN or RUN/STAGE of {here}, a student's folder, or a URL"
            )
        if isinstance(chosen, Path) or chosen.step is None:
            folder = chosen if isinstance(chosen, Path) else _student(chosen, Path())
            label = folder.name if isinstance(chosen, Path) else f"{chosen.run.name}-{chosen.stage}"
            return transports.at(folder), label, None
        raise InputError(
            f"'{given}' is a checkpoint, not a student; first export it with distill export or distill publish"
        )
    name, version = published.split(given)
    listed = published.listed(source, name)
    place, digest = published.locate(source, listed, name, version)
    _warn(listed.skipped)
    return place, name if version is None else f"{name}-{version}", digest


def _use(card: student_card.StudentCard, here: str) -> str:
    """How to use a student in the folder `here`."""
    trust = ", trust_remote_code=True" if any(name.endswith(".py") for name in card.files) else ""
    if not card.is_native or any(name.startswith("vae/") for name in card.files):
        return f'DiffusionPipeline.from_pretrained("{here}"{trust})'
    name = one_line(card.teacher) or "its teacher"
    cannot = card.stock is not None and card.stock.reason
    if "student" in card.lora and not cannot:
        calls = "; ".join(lora_use.calls(card.files, card.component, here))
        return f"{calls}, where pipeline is that of {name}; {here}/README.md says how to sample it"
    given = "--prompt TEXT" if card.num_classes is None else "--classes 0"
    more = "" if "student" in card.lora else f"; {here}/README.md has the code for diffusers"
    return (
        f"distill sample {shlex.quote(here)} --teacher TEACHER {given} --out samples.png (TEACHER: the pipeline "
        f"of {name}{more})"
    )


def _warn(skipped: list[str]) -> None:
    """Print a warning on stderr for each entry of a store that cannot be used, for at most `MANY`."""
    for each in skipped[:MANY]:
        say_error(f"warning: {one_line(each)}")
    if len(skipped) > MANY:
        say_error(f"warning: {len(skipped) - MANY:,} more entries of the store are skipped")


def _best(entry: "distill.exchange.published.PublishedVersion") -> str:
    """The first metric as text, which is the distance at the fewest steps; "-" if there is none."""
    return next((f"{key} {value:.4g}" for key, value in entry.metrics.items()), "-")


def _show(name: str, text: str) -> None:
    """Print code that --trust-code accepts."""
    say(f"--- {name}")
    say("\n".join(one_line(line) for line in text.splitlines()))
    say("---")
