"""Publishes a student as a version in the store's registry, with information from its run in the model card.

A complete folder is renamed to the version, which fails if the version exists. Of two publishers at the same time, only
one can thus get a version.
"""

import itertools
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.core import space
from distill.core.atomic import hidden_folder, sync, sync_tree, write_atomic
from distill.core.errors import InputError, RunError
from distill.core.markdown import escape
from distill.core.text import short, suggest, whole_number
from distill.exchange import contents, manifest, published, pulling, student_card
from distill.exchange.published import REGISTRY, PublishedVersion
from distill.exchange.student_card import FileRecord, Publication, StudentCard, TrainingCost
from distill.exchange.transports import RemoteFolder
from distill.runs import cached, jobs, results, todo
from distill.runs.progress import duration
from distill.runs.results import Results, Row
from distill.runs.run_store import RunPaths, read_events
from distill.spec import checks
from distill.spec.model import CacheStage, PairsStage, RunSpec, TrainStage

PICTURE = "samples.png"
ENDS = ("started", "finished", "stopped", "failed")  # events at which no stage is running
NUMBERED = re.compile(r"v([0-9]{1,9})")


@dataclass(frozen=True)
class ChosenStudent:
    """The student to publish."""

    run: RunPaths
    stage: str
    step: int | None = None
    """step of the checkpoint to export it from; None: the student that the stage has exported"""


@dataclass(frozen=True)
class Published:
    """The result of a publication."""

    entry: PublishedVersion
    new: bool
    """whether the version is new; False: the same student was already published"""
    skipped: list[str]
    """entries of the store that cannot be used, each with the reason"""


def choose(run: RunPaths, stage: str | None, which: str) -> ChosenStudent:
    """Select a student of a run. InputError if there is no such student.

    stage: None: see `train_stage`. which: "", "best" or "step-N" (exported from that checkpoint).
    """
    if which == "best":
        if stage is not None:
            name = train_stage(run, stage)
            raise InputError(f"'{run.name}/{name}@best': best is for a whole run; write {run.name}@best")
        return ChosenStudent(run, best(run))
    step = whole_number(which.removeprefix("step-")) if which.startswith("step-") else None
    if which and step is None:
        raise InputError(f"'@{short(which)}': {suggest(which[:100], ['best', 'step-N'])} (N: the step of a checkpoint)")
    return ChosenStudent(run, train_stage(run, stage), step)


def train_stage(run: RunPaths, stage: str | None) -> str:
    """The train stage of a run: the given one, else the only one, else the last one if it is finished.

    InputError if there is no such stage, or if one must be named.
    """
    trained = [name for name, each in todo.load_spec(run).stages.items() if isinstance(each, TrainStage)]
    if stage is not None:
        if stage not in trained:
            raise InputError(f"run '{run.name}' has no train stage '{stage}'; {suggest(stage, trained)}")
        return stage
    if not trained:
        raise InputError(f"run '{run.name}' has no train stage, so it has no student")
    if len(trained) > 1 and not (run.student(trained[-1]) / "distill.json").is_file():
        raise InputError(f"run '{run.name}' has {len(trained)} train stages; name one: {', '.join(trained)}")
    return trained[-1]


def best(run: RunPaths) -> str:
    """The train stage of the student with the smallest distance, at the smallest measured number of steps.

    The last evaluate stage with a distance counts. Raises InputError if no student was measured.
    """
    measured = [found for found in _evaluations(run).values() if found.distance is not None]
    trained = {name for name, each in todo.load_spec(run).stages.items() if isinstance(each, TrainStage)}
    rows = [row for row in measured[-1].usual if row.role == "student" and row.network in trained] if measured else []
    if not rows:
        raise InputError(f"run '{run.name}' has no evaluated student yet; choose one: {run.name}/STAGE")
    fewest = min(row.steps for row in rows)
    return min((row for row in rows if row.steps == fewest), key=lambda row: row.value).network


def _evaluations(run: RunPaths) -> dict[str, Results]:
    """Stage -> results, in the order of the spec."""
    found = results.of_run(run)
    return {name: found[name] for name in todo.load_spec(run).stages if name in found}


def publish(
    student: Path, store: Path, name: str, version: str | None, about: Publication, picture: bytes
) -> Published:
    """Publish a student folder as NAME:VERSION.

    version: None: the next free one of v1, v2, ... If the same student is already published, its version is returned.
    picture: content of a PNG file with samples; empty: none.
    Raises InputError if the student or the name cannot be used, and RunError if writing fails.
    """
    home = store.absolute() / REGISTRY / name
    if (store / REGISTRY / "spec.yaml").exists():
        raise InputError(
            f"{store / REGISTRY} is a run, but published students are stored in a folder with this name; move the run "
            "elsewhere"
        )
    if home.is_symlink():
        raise InputError(f"{home} is a link; distill does not publish through links. Choose another name, or remove it")
    if os.path.lexists(home) and not home.is_dir():
        raise InputError(f"{home} is not a folder, so it cannot contain a version; choose another name, or remove it")
    if picture:
        contents.refuse_picture(picture, PICTURE)
    source = RemoteFolder(student)
    old, _ = pulling.describe(source)
    try:
        with hidden_folder(home / "new") as here:
            space.require(home, sum(record.size for record in old.files.values()), f"the files of {student}")
            pulling.fetch_all(source, old, here, "publish")
            contents.refuse(here, old)
            content = student_card.to_json(_dress(here, old, about, picture)).encode()
            card = manifest.parse(content, f"the card of {name}")  # validate before a version is claimed
            published.entry_of(name, version or "v999999999", card, content, round(time.time(), 3))
            same = [entry for entry in published.scan(store, name).students if _is(entry, content, version)]
            found = same[0].version if same else _claim(here, home, version, content)
    except OSError as error:
        raise RunError(f"cannot publish in {home}: {error.strerror}; nothing was published") from error
    listed = published.write_index(store)
    entry = next((each for each in listed.students if (each.name, each.version) == (name, found)), None)
    if entry is None:
        raise RunError(f"{home / found} was published, but it was removed or changed immediately afterwards")
    return Published(entry, not same, listed.skipped)


def _is(entry: PublishedVersion, content: bytes, version: str | None) -> bool:
    return entry.digest == manifest.digest(content) and version in (None, entry.version)


def _claim(here: Path, home: Path, version: str | None, content: bytes) -> str:
    """Rename the complete folder to its version, or to the first free one. Only the rename tells if it is free."""
    write_atomic(here / student_card.FILE_NAME, content)
    sync_tree(here)
    for wanted in [version] if version is not None else _numbers(home):
        try:
            here.rename(home / wanted)
        except OSError:
            if not os.path.lexists(home / wanted):
                raise
            if (home / wanted).is_symlink() or not (home / wanted).is_dir():
                kind = "a link" if (home / wanted).is_symlink() else "a file"
                raise InputError(
                    f"{home / wanted} is {kind}, not a published student; publish another version, or remove it"
                ) from None
            continue  # another publisher has taken it
        sync(home)
        return wanted
    raise InputError(
        f"{home.name}:{version} is already published with other files, and published versions never change; "
        f"give another version, or none: {home.name}"
    )


def _numbers(home: Path) -> Iterator[str]:
    taken = [int(match[1]) for path in home.iterdir() if (match := NUMBERED.fullmatch(path.name))]
    return (f"v{number}" for number in itertools.count(max(taken, default=0) + 1))


def _dress(here: Path, old: StudentCard, about: Publication, picture: bytes) -> StudentCard:
    """Add the complete model card and the picture to a student folder; returns its new card."""
    card = old.model_copy(update={"name": about.name})
    new = {student_card.README: student_card.readme(card, about).encode(), **({PICTURE: picture} if picture else {})}
    for name, content in new.items():
        write_atomic(here / name, content)
    records = {name: FileRecord(sha256=manifest.digest(content), size=len(content)) for name, content in new.items()}
    return card.model_copy(update={"files": dict(sorted({**old.files, **records}.items()))})


# --- information from the run ---


@dataclass
class Time:
    """The time that processes spent on a stage, summed up while events are read."""

    total: float = 0.0
    """seconds of the finished sessions"""
    began: float | None = None
    last: float = 0.0
    """time of the last event of the stage"""
    place: str = ""
    """device"""

    def end(self) -> None:
        if self.began is not None:
            self.total, self.began = self.total + self.last - self.began, None


def describe(name: str, chosen: ChosenStudent, images: int, picture: str) -> Publication:
    """The information from the run for the model card.

    images: samples that the student was trained on. The student of a checkpoint has no measurements.
    """
    spec = todo.load_spec(chosen.run)
    _, found = _measured(chosen)
    rows = [] if found is None else [row for row in found.rows if row.role == "teacher" or row.network == chosen.stage]
    times = _times(chosen, _ancestry(spec, chosen.stage))
    return Publication(
        name=name,
        picture=picture,
        measured="" if found is None else _describe(found, chosen.stage),
        columns=[] if found is None else ["", "steps", *results.columns(found)],
        rows=[] if found is None else [_cells(found, row, chosen.stage) for row in rows],
        costs=[_cost(chosen, spec, each, images, took) for each, took in times.items()],
    )


def _describe(found: Results, stage: str) -> str:
    """A text above the table of measurements."""
    return f"NFE: calls of a network per sample. {results.describe(found)}{results.verdicts(found, stage)}"


def _cells(found: Results, row: Row, stage: str) -> list[str]:
    """The cells of a table row, as Markdown."""
    own = row.role == "student"
    label = f"**this student**{escape(row.label.removeprefix(stage))}" if own else escape(row.label)
    return [label, *map(escape, [str(row.steps), *results.cells(found, row)])]


def _measured(chosen: ChosenStudent) -> tuple[str, Results | None]:
    """(stage, results) of the last evaluation that measured the student; ("", None) for a checkpoint or if none did."""
    measured = _evaluations(chosen.run) if chosen.step is None else {}
    with_it = [(n, each) for n, each in measured.items() if any(row.network == chosen.stage for row in each.rows)]
    return with_it[-1] if with_it else ("", None)


def samples(chosen: ChosenStudent) -> bytes:
    """The picture of the student's samples at the smallest evaluated number of steps; b"" if there is none.

    Raises InputError if results.json names anything but a picture in the folder of its stage.
    """
    stage, found = _measured(chosen)
    rows = [row for row in found.usual if row.role == "student" and row.network == chosen.stage] if found else []
    if not rows:
        return b""
    fewest = min(rows, key=lambda row: row.steps)
    return results.picture(chosen.run.stage(stage).root, fewest.picture) or b""


def _ancestry(spec: RunSpec, stage: str) -> list[str]:
    """The stages that a student's stage depends on, with the cache stage, and itself as the last."""
    wanted = {stage}
    for name in reversed(spec.stages):
        if name in wanted:
            wanted |= {*checks.needed(spec, name)}
    return [name for name in spec.stages if name in wanted]


def _cost(chosen: ChosenStudent, spec: RunSpec, name: str, images: int, took: Time) -> TrainingCost:
    stage = spec.stages[name]
    procs = spec.launch.world_size
    seconds = took.total
    match stage:
        case TrainStage():
            work = f"{images if name == chosen.stage else stage.images:,} images"
        case PairsStage():
            work = f"{stage.count:,} pairs"
        case _:
            assert isinstance(stage, CacheStage), "nothing else leads to a student"
            made = cached.noted(chosen.run, name) or []
            work = ", ".join(f"{each.count:,} {each.unit}" for each in made)
    if not isinstance(stage, TrainStage):
        seconds += _time_of_parts(chosen.run, name)
    processes = f"{procs} process{'es' if procs > 1 else ''}"
    return TrainingCost(name, work, duration(seconds), f"{processes}, {took.place}" if took.place else processes)


def _times(chosen: ChosenStudent, stages: Sequence[str]) -> dict[str, Time]:
    """Stage -> time; for the student's own stage, up to the checkpoint that it is exported from."""
    times = {stage: Time() for stage in stages}
    counted = dict(times)  # the stages that are still counted
    for event in read_events(chosen.run):
        kind, of = event["event"], event.get("stage", event.get("label", ""))
        mine = counted.get(of)
        if mine is not None and mine.began is not None:
            mine.last = event["time"]
        if kind in ENDS:
            for each in counted.values():
                each.end()
        elif mine is not None and kind == "stage started":
            mine.began = mine.last = event["time"]
            mine.place = event.get("device", mine.place)
        elif mine is not None and kind == "stage done":
            mine.end()
        elif mine is not None and (kind, of, event.get("step")) == ("saved", chosen.stage, chosen.step):
            mine.end()
            del counted[of]
    for each in times.values():
        each.end()
    return times


def _time_of_parts(run: RunPaths, stage: str) -> float:
    """Seconds that the jobs of an array spent on a pairs or cache stage. These jobs write no events of the run."""
    total, began = 0.0, None
    members = (m for job in jobs.submitted(run) if job.parts is not None and stage in job.stages for m in job.members)
    for line in (line for member in members for line in jobs.history(run, member)):
        if line["event"] == "began":
            began = line["time"]
        elif line["event"] == "ended" and began is not None:
            total, began = total + line["time"] - began, None
    return total
