"""Students as teachers: of later stages, and to be sampled."""

from pathlib import Path

from distill.core.errors import InputError
from distill.spec.model import CheckpointTeacher, NetworkStage, RunSpec, TeacherSpec
from distill.teachers import files
from distill.teachers.architectures import class_name, known
from distill.teachers.codecs import LatentCodec, pixel_size
from distill.teachers.convention import Convention
from distill.teachers.describe import describe
from distill.teachers.layout import CONFIG
from distill.teachers.read import parse


def stage_teacher(spec: RunSpec, stage: NetworkStage, students: Path) -> TeacherSpec | None:
    """The teacher of a stage: the student of another stage, exported below `students`, or the spec's; None if none."""
    return spec.teacher if stage.teacher is None else student_as_teacher(students / stage.teacher, spec.teacher)


def weak_teacher(spec: RunSpec, stage: NetworkStage, students: Path) -> TeacherSpec | None:
    """The weak model of a stage with autoguidance: the student of another stage, or a checkpoint; None if none.

    Like a student, it has the conditions, the size and the autoencoder of the spec's teacher.
    """
    guidance = stage.guidance
    if guidance is None or not guidance.is_auto:
        return None
    path = guidance.weak_path or str(students / (guidance.weak or ""))
    return student_as_teacher(Path(path), spec.teacher)


def student_as_teacher(folder: Path, teacher: TeacherSpec | None) -> CheckpointTeacher:
    """An exported student as a teacher: on samples of the same size, with the same conditions as the spec's teacher.

    It has the teacher's autoencoder, because none is exported with students. If its card names an embedded guidance,
    the teacher must have the same or none (see `with_guidance`, which is called when the student is read).
    """
    if not isinstance(teacher, CheckpointTeacher):
        return CheckpointTeacher(path=str(folder))
    same = teacher.model_dump(include={"size", "conditions", "embedded_guidance", "vae"})
    student = CheckpointTeacher(path=str(folder), **same)
    return student if teacher.vae is not None else student.model_copy(update={"vae": _autoencoder(student, teacher)})


def in_size_of(shape: tuple[int, ...], teacher: TeacherSpec | None) -> TeacherSpec | None:
    """The teacher of a student that makes samples of this shape: in the size of these samples, unless it has a size.

    InputError if the teacher is no checkpoint that can be used.
    """
    if not isinstance(teacher, CheckpointTeacher) or teacher.size is not None:
        return teacher
    parts = files.find(teacher, download=False)
    facts = describe(teacher, parts, parts.student.kind)
    if not isinstance(facts.architecture, Convention) or len(shape) != len(facts.shape) or shape == facts.shape:
        return teacher
    factors = facts.codec.factors if isinstance(facts.codec, LatentCodec) else facts.architecture.default_factors
    return teacher.model_copy(update={"size": list(pixel_size(shape[1:], factors))})


def _autoencoder(student: CheckpointTeacher, teacher: CheckpointTeacher) -> str | None:
    """The folder of the teacher's autoencoder; None if it has none, or if the teacher is no longer where it was.

    InputError if the teacher is on the hub and cannot be reached, and the student needs its autoencoder.
    """
    try:
        found = files.find(teacher, download=False).autoencoder
    except InputError:
        network = parse(files.find(student).model / CONFIG)
        if teacher.is_of_hub and isinstance(known().get(str(class_name(network))), Convention):
            raise
        return None
    return None if found is None or not found.is_dir() else str(found)
