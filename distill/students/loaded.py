"""Loading of student folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from distill.core.errors import InputError
from distill.exchange import student_card
from distill.exchange.student_card import StudentCard
from distill.flow.codecs import PIXELS
from distill.flow.conditioning import of_classes, with_range
from distill.networks.acceleration import AccelerationStudent
from distill.networks.adapters import require_peft
from distill.networks.flow_map import FlowMapStudent
from distill.networks.sharing import main_dtype
from distill.networks.velocity import VelocityStudent
from distill.protocols import Codec, Conditioning
from distill.spec.model import CheckpointTeacher, TeacherSpec
from distill.students import native, native_folder
from distill.teachers import checkpoint
from distill.teachers.loaded import LoadedTeacher, Packaging
from distill.teachers.of_students import student_as_teacher

Student = VelocityStudent | FlowMapStudent | AccelerationStudent
KINDS: dict[str, type[Student]] = {
    "velocity": VelocityStudent,
    "flow_map": FlowMapStudent,
    "acceleration": AccelerationStudent,
}


@dataclass(frozen=True)
class LoadedStudent:
    """A student of any kind: frozen, in float32 and in evaluation mode."""

    student: Student
    sampler: str  # a name in samplers/
    t_grids: Mapping[int, Sequence[float]]  # number of steps -> times from 1 to 0; empty: uniform times, any number
    shape: tuple[int, ...]  # of one sample
    num_classes: int | None  # without the null class; None: unconditional
    null_class: int | None  # class of the unconditional call
    digest: str  # sha256 over configuration and weights
    description: str  # one line for people
    fitted: Mapping[int, list[list[float]]] = field(default_factory=dict)  # weights of its sampler, as in the card
    given: Conditioning | None = None  # None: class labels, or no conditioning if there are no classes
    packaging: Packaging | None = None
    codec: Codec = PIXELS
    base_digest: str = ""  # of a LoRA student: that of the teacher whose weights it shares

    @property
    def conditioning(self) -> Conditioning:
        return self.given or of_classes(self.num_classes, self.null_class)

    @property
    def network(self) -> nn.Module:
        return self.student.network


def load_student(
    folder: Path, device: torch.device, like: TeacherSpec | None = None, shared: LoadedTeacher | None = None
) -> LoadedStudent:
    """Load a student from a folder written by `exporting.export`.

    like: the teacher whose size and conditions the student has, if its network is one of a latent-space pipeline.
    shared: that teacher, if it is loaded. A LoRA student then shares its weights.
    """
    card = student_card.read(folder)
    spec = student_as_teacher(folder, like)
    if card.lora.get("student") is not None:
        return _load_lora(folder, card, device, like, shared)
    found = checkpoint.read(spec, device, card.kind)
    if native.is_native(found.network):
        student, digest = native_folder.load(found, spec, card.kind), native_folder.digest(found, folder)
    else:
        student, digest = KINDS[card.kind](found.network), found.digest
    return LoadedStudent(
        student=student.to(device).eval().requires_grad_(False),
        sampler=card.sampler,
        t_grids=card.t_grids,
        shape=found.shape,
        num_classes=found.conditioning.count,
        null_class=checkpoint.null_class(found.conditioning),
        digest=digest,
        description=found.description,
        fitted=card.fitted,
        given=found.conditioning,
        packaging=found.packaging,
        codec=found.codec,
    )


def _load_lora(
    folder: Path, card: StudentCard, device: torch.device, like: TeacherSpec | None, shared: LoadedTeacher | None
) -> LoadedStudent:
    require_peft()
    from distill.students import lora_folder  # imports PEFT, which takes seconds

    if not isinstance(like, CheckpointTeacher):
        raise InputError(
            f"{folder} is a LoRA student, which has no weights of its own; give its teacher "
            f"({card.teacher or 'not named in its card'}) with --teacher"
        )
    like, base = like.with_guidance(card, folder), shared
    if base is None or not _is_base(base, card, device, checkpoint.DTYPES[like.dtype]):
        base = checkpoint.load(like, device, probe=False)
    student, digest = lora_folder.load(folder, card, base)
    return LoadedStudent(
        student=student.to(device).eval().requires_grad_(False),
        sampler=card.sampler,
        t_grids=card.t_grids,
        shape=base.shape,
        num_classes=base.num_classes,
        null_class=base.null_class,
        digest=digest,
        description=f"the LoRA student {folder.name} of {base.description}",
        fitted=card.fitted,
        given=with_range(base.given, card.guidance_range),
        packaging=base.packaging,
        codec=base.codec,
        base_digest=base.base_digest,
    )


def _is_base(teacher: LoadedTeacher, card: StudentCard, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a teacher is the base of a LoRA student as the student needs it, on a device and in a data type."""
    network, embedded = teacher.network, None if teacher.packaging is None else teacher.packaging.embedded_guidance
    return (
        network is not None
        and teacher.base_digest == card.base_digest
        and (card.embedded_guidance in (None, embedded) or card.guidance_range is not None)
        and {each.device.type for each in network.parameters()} == {device.type}
        and main_dtype(network) == dtype
    )
