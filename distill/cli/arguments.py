"""Parses arguments of commands: students, teachers, data, devices, lists of numbers. Invalid ones raise InputError."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from distill.core import yamltext
from distill.core.errors import InputError
from distill.core.field_types import MAX_STEPS
from distill.core.text import short, suggest, whole_number
from distill.exchange import student_card
from distill.exchange.student_card import StudentCard
from distill.runs import cached, todo
from distill.runs.run_store import RunPaths
from distill.spec import checks, evalchecks, schema, specfile
from distill.spec.model import (
    CheckpointTeacher,
    DataSpec,
    EvaluateStage,
    LaunchSpec,
    RunSpec,
    TeacherSpec,
    TrainStage,
    is_path,
)

if TYPE_CHECKING:
    import torch

StageModel = TypeVar("StageModel", bound=BaseModel)


def numbers(option: str, text: str) -> list[int]:
    """Parse comma-separated whole numbers."""
    found = [number for part in text.split(",") if (number := whole_number(part.strip())) is not None]
    if len(found) != text.count(",") + 1:
        raise InputError(f"{option} {short(text)}: give whole numbers separated by commas, like 1,2,4")
    return found


def steps(option: str, text: str) -> list[int]:
    """Parse comma-separated numbers of steps."""
    found = numbers(option, text)
    if not all(1 <= number <= MAX_STEPS for number in found):
        raise InputError(f"{option} {short(text)}: numbers of steps must be from 1 to {MAX_STEPS:,}")
    return found


def fractions(option: str, text: str) -> list[float]:
    """Parse comma-separated finite numbers."""
    try:
        found = [float(part) for part in text.split(",")]
        if all(map(math.isfinite, found)):
            return found
        raise ValueError
    except ValueError:
        raise InputError(f"{option} {short(text)}: give numbers separated by commas, like 1,0.5,0") from None


def times(option: str, text: str) -> list[float]:
    """Parse comma-separated times, which must go down from 1 (noise) to 0 (data)."""
    found = fractions(option, text)
    if not is_path(found):
        raise InputError(f"{option} {short(text)}: times must decrease from 1 to 0, like 1,0.6,0")
    return found


def stage(model: type[StageModel], content: dict[str, Any]) -> StageModel:
    """A stage from options, validated strictly as in a spec. Messages name the options."""
    try:
        return model.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        mistakes = schema.explain(error, model, content)
    raise InputError("\n  ".join(map(as_option, mistakes)))


def evaluation(content: dict[str, Any]) -> EvaluateStage:
    """An evaluate stage from options, with the checks that a spec has."""
    found = stage(EvaluateStage, content)
    if mistakes := list(evalchecks.mistakes(found, "")):
        raise InputError("\n  ".join(map(as_option, mistakes)))
    return found


def as_option(mistake: str) -> str:
    """A message about a field, rewritten to name the option of the field."""
    field, _, rest = mistake.partition(":")
    return f"--{field.replace('_', '-')}:{rest}"


def device(name: str) -> "torch.device":
    """The device for a value of --device."""
    from distill.execution import devices

    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name}: {suggest(name, ['auto', 'cpu', 'cuda'])}")
    return devices.place(LaunchSpec.model_validate({"device": name}))


def is_yaml(given: str) -> bool:
    """Whether the text is a YAML mapping and not a name."""
    return given.lstrip().startswith("{")


def student(given: str, store: Path) -> Path:
    """The folder of a student, given as a path or as RUN/STAGE."""
    run, _, stage = given.rpartition("/")
    for folder in (Path(given), store / run / "students" / stage) if run else (Path(given),):
        if (folder / "distill.json").is_file():
            return folder.absolute()
    if (store / given / "spec.yaml").is_file():
        names = sorted(path.parent.name for path in (store / given).glob("students/*/distill.json"))
        raise InputError(f"'{given}' is a run; name one of its students: {', '.join(f'{given}/{n}' for n in names)}")
    raise InputError(f"there is no student '{given}'; give a student folder, or RUN/STAGE of a run in {store}")


def teacher(given: str, store: Path) -> TeacherSpec:
    """A teacher, given as YAML, as RUN/STAGE, or as the folder or hub id of a checkpoint."""
    run, _, stage = given.rpartition("/")
    content: object = {"path": given}
    if is_yaml(given):
        content = yamltext.parse(given, "TEACHER")
    elif Path(given).exists():
        content = {"path": str(Path(given).absolute())}
    elif run and (store / run / "students" / stage / "distill.json").is_file():
        content = {"path": str((store / run / "students" / stage).absolute())}
    spec = _part({"teacher": content})
    assert spec.teacher is not None
    return spec.teacher


def data(given: str) -> DataSpec:
    """Real data, given as the name of its kind or as YAML."""
    content = yamltext.parse(given, "--data") if is_yaml(given) else {"kind": given}
    found = _part({"data": content}).data
    if found.in_buckets:
        raise InputError("--data: buckets have no effect here, because only training uses them; remove them")
    if not found.has_samples and found.kind != "none":
        raise InputError(f"--data: kind {found.kind} has no images; give data with images")
    return found


def _part(content: dict[str, object]) -> RunSpec:
    """A validated spec with a teacher or data only. Its paths are relative to the current folder."""
    spec = specfile.located(specfile.validate({"name": "options", "stages": {}, **content}, "options"), [Path.cwd()])
    mistakes = [*checks.teacher_mistakes(spec), *spec.data.mistakes()]
    if mistakes:
        raise InputError("\n  ".join(mistakes))
    return spec


def teacher_of(student: Path, *, prompted: bool = False) -> TeacherSpec:
    """The teacher in the spec of the student's run: that of its stage, or that of the spec if it is a LoRA student.

    prompted: without the conditions in the run's cache.
    """
    from distill.teachers.of_students import stage_teacher

    given, run = _spec_of(student, "--teacher")
    spec = given if prompted else cached.with_conditions(given, RunPaths(run))
    stage = spec.stages.get(student.name)
    found = stage_teacher(spec, stage, run / "students") if isinstance(stage, TrainStage) else spec.teacher
    if isinstance(found, CheckpointTeacher) and student_card.is_lora(Path(found.path)):
        found = spec.teacher
    if found is None:
        raise InputError(f"{student} was trained without a teacher; give one with --teacher")
    return found


def teacher_of_run(student: Path) -> TeacherSpec | None:
    """The teacher of the spec of the student's run; None if the student is not part of a run.

    For a student that is a complete pipeline, which has an autoencoder and text encoders, it is the student itself.
    """
    if student_card.read(student).pipeline:
        return CheckpointTeacher(path=str(student))
    run = RunPaths(student.parent.parent)
    if not _is_in_run(student):
        return None
    return cached.with_conditions(todo.load_spec(run), run).teacher


def prompted_teacher(
    given: str | None, card: StudentCard, student: Path, store: Path, classes: str = ""
) -> CheckpointTeacher:
    """The teacher whose text encoders encode prompts for a student: that of --teacher, or of the student's run.

    InputError if the student takes no prompts, or if there is no such teacher. classes: what --classes gives.
    """
    if card.num_classes is not None or not card.is_native:
        kind, remedy = "is unconditional", "leave the prompts out"
        if card.num_classes is not None:
            kind, remedy = f"is conditional on {card.num_classes} classes", "use --classes instead of prompts"
        raise InputError(f"{student.name} {kind}, and takes no prompts; {remedy}")
    if classes:
        raise InputError(f"--classes: {student.name} takes prompts, so this has no effect; remove it")
    run = RunPaths(student.parent.parent)
    found: TeacherSpec | None = None
    if given is not None:
        found = teacher(given, store)
    elif card.pipeline:
        found = CheckpointTeacher(path=str(student))
    elif _is_in_run(student):
        found = todo.load_spec(run).teacher
    if not isinstance(found, CheckpointTeacher):
        raise InputError(
            f"{student.name}: prompts are encoded by the text encoders of its teacher's pipeline; name it with "
            "--teacher, a folder or hub id"
        )
    if given is not None and found.conditions is not None:
        raise InputError(
            f"--teacher: conditions={found.conditions} and prompts were given, but samples have either; remove one of "
            "both"
        )
    return found.model_copy(update={"conditions": None})


def _is_in_run(student: Path) -> bool:
    return student.parent.name == "students" and RunPaths(student.parent.parent).spec.is_file()


def data_of(student: Path) -> DataSpec:
    """The data in the spec of the student's run, without buckets."""
    return _spec_of(student, "--data")[0].data.in_one_size()


def _spec_of(student: Path, option: str) -> tuple[RunSpec, Path]:
    run = RunPaths(student.parent.parent)
    if not _is_in_run(student):
        raise InputError(f"{student} is not part of a run, so its {option[2:]} is not known; give {option}")
    return todo.load_spec(run), run.root
