"""Whether the networks and the data of an evaluation fit together."""

from collections.abc import Mapping

from distill.core.errors import InputError
from distill.data import DataSet
from distill.data.encoded import sample_shape
from distill.evaluation.metrics.manifold import NEIGHBOURS
from distill.networks.velocity import VelocityStudent
from distill.spec.model import EvaluateStage
from distill.students.loaded import LoadedStudent
from distill.students.sampling import refuse_other_times, refuse_steps
from distill.teachers import LoadedTeacher


def refuse_few(data: DataSet) -> None:
    """InputError if there are too few images for the metrics."""
    if len(data) <= NEIGHBOURS:
        raise InputError(
            f"data '{data.name}' has {len(data)} images, but an evaluation needs at least {NEIGHBOURS + 1}, since it "
            f"compares each with its {NEIGHBOURS} nearest neighbours"
        )


def check(
    stage: EvaluateStage, teacher: LoadedTeacher, students: Mapping[str, LoadedStudent], data: DataSet | None
) -> None:
    """InputError if networks and data cannot be compared. Called before anything is written."""
    assert all(isinstance(students[name].student, VelocityStudent) for name in stage.fine_students), "checks.check"
    for name, student in students.items():
        if (student.shape, student.num_classes) != (teacher.shape, teacher.num_classes):
            raise InputError(
                f"student {name} makes samples of shape {list(student.shape)} with {student.num_classes or 'no'} "
                f"classes, but the teacher {list(teacher.shape)} with {teacher.num_classes or 'no'}; "
                "compare a student with its own teacher"
            )
        refuse_steps(student.t_grids, stage.students[name], f"students.{name}")
        if stage.times.get(name):
            refuse_other_times(student, f"times.{name}")
    if data is not None:
        refuse_few(data)
    if data is not None and sample_shape(data, teacher.codec) != teacher.shape:
        raise InputError(
            f"data '{data.name}' has samples of shape {list(data.shape)}, but the teacher ({teacher.description}) "
            f"makes {list(teacher.shape)}; evaluate on data of the teacher's shape"
        )
