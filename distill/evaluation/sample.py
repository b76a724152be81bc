"""`distill sample`: samples of a student folder, as a picture or as numbers."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from distill.core.atomic import write_atomic
from distill.core.errors import InputError, RunError
from distill.evaluation.pictures import as_images, columns_for, images_png, scatter_png
from distill.exchange import student_card
from distill.flow.conditioning import with_guidance
from distill.flow.draws import sample_labels, sample_noise
from distill.spec.model import CheckpointTeacher, TeacherSpec
from distill.students import fitted, loaded
from distill.students.fitted import FittedSolver
from distill.students.loaded import LoadedStudent
from distill.students.sampling import fresh_noises, of_student, refuse_steps, times_of
from distill.teachers import encoding
from distill.teachers.architectures import known
from distill.teachers.convention import Convention
from distill.teachers.of_students import in_size_of

BLOCK = 250  # samples that are made together, at most


def write_samples(
    folder: Path,
    out: Path,
    *,
    steps: int,
    seed: int,
    count: int,
    labels: Sequence[int] | None,
    device: torch.device,
    prompts: Sequence[str] = (),
    like: TeacherSpec | None = None,
    along: Callable[[LoadedStudent], Sequence[float]] | None = None,
    fit: Callable[[LoadedStudent], FittedSolver] | None = None,
    guidance: float | None = None,
) -> None:
    """Write samples of a student as a picture (.png), or with their noises and labels (.safetensors).

    like: see `load_student`. Its text encoders encode the `prompts`, which samples use in turn; their memory is free
    before the student is loaded. Without prompts, its conditions are used.
    labels: one class for all samples, one class for each sample, or None for all classes in turn.
    along: returns the step times to use; None: the student's times for this number of steps.
    fit: returns the solver to use; None: the student's sampler.
    guidance: the guidance scale, for students that take it as an input; None: the middle of their range.

    InputError for options that do not fit the student; RunError if a sample is not finite.
    """
    if out.suffix not in (".png", ".safetensors"):
        raise InputError(f"--out {out}: the name must end in .png (a picture) or .safetensors (tensors)")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: {out.absolute().parent} is not a folder; create it first")
    card = student_card.read(folder)
    if along is None and fit is None:
        refuse_steps(card.t_grids, [steps], "--steps")
    like = in_size_of(card.shape, like)
    with with_prompts(like, prompts, like, device) as given:
        refuse_without_prompts(folder, given)
        student = loaded.load_student(folder, device, given)
    conditioning = with_guidance(student.conditioning, guidance, "--guidance")
    times = times_of(student, steps) if along is None else torch.tensor(along(student), dtype=torch.float64)
    method, parts = of_student(student, times) if fit is None else fitted.of_field(student.student, fit(student)), []
    noise = sample_noise(seed, range(count), student.shape)
    fresh = fresh_noises(seed, range(count), student.shape, method.fresh)
    classes = _labels(student, count, labels)
    block = min(BLOCK, student.codec.together(student.shape))
    for start in range(0, count, block):
        rows = slice(start, start + block)
        cond = {} if classes is None else conditioning.collate(classes[rows].to(device))
        further = [each[rows].to(device) for each in fresh]
        parts.append(method.generate(noise[rows].to(device), cond, further).cpu())
    samples = torch.cat(parts)
    if not samples.isfinite().all():
        raise RunError(f"the samples of {folder} contain NaN or infinity; nothing was written")
    if out.suffix == ".safetensors":
        tensors = {"latents": noise, "samples": samples.contiguous()}
        if fresh:
            tensors["fresh"] = torch.stack(fresh)  # [N - 1, count, ...], as the student's pipeline takes them
        if classes is not None:
            tensors["class_labels"] = classes
        write_atomic(out, save(tensors, {"prompts": json.dumps(prompts)} if prompts else None))
    elif samples.ndim > 2:
        columns = columns_for(count, student.num_classes if labels is None else None)
        images = torch.cat([as_images(student.codec.decode(part.to(device)).cpu()) for part in parts])
        write_atomic(out, images_png(images, min(columns, count)))
    else:
        write_atomic(out, scatter_png(samples, None))


@contextmanager
def with_prompts(
    teacher: TeacherSpec | None, prompts: Sequence[str], like: TeacherSpec | None, device: torch.device
) -> Iterator[TeacherSpec | None]:
    """The teacher with the conditions of the prompts, in a temporary file; without prompts, the teacher as it is.

    like: the teacher whose text encoders encode them.
    """
    if not prompts:
        yield teacher
        return
    assert isinstance(like, CheckpointTeacher) and isinstance(teacher, CheckpointTeacher), "text encoders are needed"
    with tempfile.TemporaryDirectory(prefix="distill-") as temporary:
        path = Path(temporary) / "prompts.safetensors"
        encoding.write(like, prompts, path, device)
        yield teacher.model_copy(update={"conditions": str(path)})


def refuse_without_prompts(folder: Path, teacher: TeacherSpec | None) -> None:
    """InputError if a student takes prompts, but its teacher has neither prompts nor other conditions."""
    card = student_card.read(folder)
    convention = known().get(card.network) if card.is_native else None
    has_rows = isinstance(teacher, CheckpointTeacher) and teacher.conditions is not None
    if isinstance(convention, Convention) and convention.conditions == "text" and not has_rows:
        raise InputError(
            f"{folder.name} takes prompts; give some with --prompt or --prompts, or with --teacher '{{path: TEACHER, "
            "conditions: FILE}' a FILE that `distill encode` has made"
        )


def _labels(student: LoadedStudent, count: int, labels: Sequence[int] | None) -> Tensor | None:
    if student.num_classes is None:
        if labels is not None:
            raise InputError("--classes was given, but this student is unconditional; leave it out")
        return None
    if labels is None:
        return sample_labels(range(count), student.num_classes)
    if len(labels) not in (1, count):
        raise InputError(f"{len(labels)} classes for {count} samples; give one class, or one for each sample")
    wrong = sorted({label for label in labels if not 0 <= label < student.num_classes})
    if wrong:
        raise InputError(f"class {wrong[0]} does not exist; this student knows 0 to {student.num_classes - 1}")
    return torch.tensor(list(labels) if len(labels) == count else [labels[0]] * count, dtype=torch.int64)
