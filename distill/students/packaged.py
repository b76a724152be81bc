"""Finished students for other people: as complete pipelines of diffusers, and with weights of another data type."""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.core.atomic import hidden_folder, new_folder
from distill.core.errors import InputError, RunError
from distill.core.regular_files import BLOCK, open_regular
from distill.exchange import manifest, own_code, student_card
from distill.exchange.student_card import StudentCard
from distill.networks.two_times import TwoTimes
from distill.spec.model import CheckpointTeacher, TeacherSpec
from distill.students import native_folder, stock, whole, with_code
from distill.students.stock_check import CheckedStudent, check, size_of
from distill.teachers import checkpoint, layout, pipeline_index
from distill.teachers.of_students import student_as_teacher
from distill.teachers.quiet import quiet
from distill.teachers.read import parse, short

OWN = (*layout.NETWORKS, layout.SECOND, "scheduler")  # components that students have
CPU = torch.device("cpu")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # names on the command line


@dataclass(frozen=True)
class Package:
    """What is written. teacher: of the other components of a complete pipeline; None: only network and scheduler."""

    dtype: str = "fp32"
    teacher: TeacherSpec | None = None


def export(student: Path, folder: Path, package: Package | None = None) -> None:
    """Write a student folder again as the new folder `folder`, checked in plain diffusers; package: None: as it is.

    InputError if the student's network is not one of a pipeline in diffusers, or if a component is missing; RunError if
    diffusers reads other weights or makes other samples, or if writing fails. Then there is no folder.
    """
    card = student_card.read(student)
    manifest.refuse_files(card, str(student / student_card.FILE_NAME))
    student_card.verify(student)
    if package is None:
        _copy(student, folder, [*card.files, student_card.FILE_NAME])
        return
    if not card.network:
        raise InputError(
            f"{student}: --whole and --dtype have no effect, because its folder has a pipeline of its own, which needs "
            "no other components and is checked in float32; leave them out"
        )
    teacher = None if package.teacher is None else _plain(whole.local(package.teacher))
    if card.lora.get("student") is not None:
        _export_lora(student, folder, package.dtype, teacher)
        return
    pipeline, others = _pipeline_of(student), whole.OtherComponents()
    if teacher is not None:
        others = whole.find(teacher, pipeline, OWN)
    made = _loaded(student, card, teacher, DTYPES[package.dtype])
    if teacher is not None and not made.how.works:
        raise InputError(f"--whole: no pipeline can sample {student}: {made.how.reason}; leave --whole out")
    try:
        with new_folder(folder.absolute()) as new:
            _write(made, new, others)
            check(made, new, pipeline, whole=teacher is not None)
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror}; nothing was kept") from error


def _pipeline_of(student: Path) -> str:
    """The class of a student's pipeline. InputError if diffusers has no such class."""
    path = student / layout.INDEX
    given = parse(path).get("_class_name")
    name = own_code.stock_class(given)
    if pipeline_index.class_of(name) is None:
        raise InputError(
            f"{path}: _class_name is {short(repr(given))}; valid: the name of a pipeline class of diffusers, like "
            "StableDiffusion3Pipeline; export or copy the student again"
        )
    return name


def _plain(teacher: CheckpointTeacher) -> CheckpointTeacher:
    """A teacher without what a student has in its card, or does not need."""
    return teacher.model_copy(update={"conditions": None, "size": None})


def _export_lora(student: Path, folder: Path, dtype: str, teacher: CheckpointTeacher | None) -> None:
    """Export a LoRA student whose adapters are added to the weights of its teacher first."""
    if teacher is None:
        raise InputError(
            f"{student} is a LoRA student, which has no network of its own: --dtype needs --whole, which adds its "
            "adapters to the weights of its teacher"
        )
    from distill.students import merged  # imports PEFT, which takes seconds

    with hidden_folder(folder.absolute()) as temporary:
        merged.merge_student(student, teacher, temporary / "student")
        export(temporary / "student", folder, Package(dtype, teacher))


def copy_files(student: Path, new: Path, names: Iterable[str]) -> None:
    """Copy files of a student to a new folder. OSError if one is missing or cannot be copied."""
    for name in names:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        with open_regular(student / name) as source, (new / name).open("xb") as target:
            shutil.copyfileobj(source, target, BLOCK)


def _copy(student: Path, folder: Path, names: Sequence[str]) -> None:
    try:
        with new_folder(folder.absolute()) as new:
            copy_files(student, new, names)
    except OSError as error:
        raise RunError(f"cannot copy {student} to {folder}: {error.strerror}; nothing was kept") from error


def _loaded(student: Path, card: StudentCard, teacher: CheckpointTeacher | None, dtype: str) -> CheckedStudent:
    """The student with its weights in a data type. Its conditions are stood for by those of one prompt."""
    spec = student_as_teacher(student, teacher).model_copy(update={"dtype": dtype})
    is_unknown = card.embedded_guidance is None and spec.embedded_guidance is None  # in cards of earlier versions
    if is_unknown and parse(student / card.component / layout.CONFIG).get("guidance_embeds"):
        guidance = None if card.stock is None else card.stock.arguments.get("guidance_scale")
        spec = spec.model_copy(update={"embedded_guidance": guidance})
    found = checkpoint.read(spec, CPU, card.kind, prompts=1)
    made = native_folder.load(found, spec, card.kind)
    if isinstance(made.network, TwoTimes):
        with quiet():
            made.network.gap.to(checkpoint.DTYPES[dtype])
    made.eval().requires_grad_(False)
    how = stock.of(made, card.sampler, card.t_grids, found.packaging, min(card.trained_for, default=None))
    if teacher is not None and not how.works:
        how = with_code.of(made, card.sampler, card.t_grids, found.packaging)
    return CheckedStudent(made, found, card, how, dtype)


def _write(made: CheckedStudent, new: Path, others: whole.OtherComponents) -> None:
    with quiet():
        card = native_folder.write(made.student.network, new, made.found.packaging, made.card, made.how)
    update: dict[str, object] = {"dtype": "" if made.dtype == "float32" else made.dtype, "pipeline": "", "size": []}
    if others.index:
        whole.place(others, new)
        path = new / layout.INDEX
        index = {**parse(path), **others.index}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        update |= {"pipeline": index["_class_name"], "size": list(size_of(made))}
    if with_code.is_needed(made.how, made.student.network):
        with_code.write(new, made.student.network, made.how)
    student_card.write(new, card.model_copy(update=update))
