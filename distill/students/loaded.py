"""Loading of student folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import ModelMixin

from distill.exchange import student_card
from distill.flow.conditioning import of_classes
from distill.networks.acceleration import AccelerationStudent
from distill.networks.flow_map import FlowMapStudent
from distill.networks.velocity import VelocityStudent
from distill.protocols import Conditioning
from distill.spec.model import CheckpointTeacher
from distill.teachers import checkpoint

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

    @property
    def conditioning(self) -> Conditioning:
        return of_classes(self.num_classes, self.null_class)

    @property
    def network(self) -> ModelMixin:
        return self.student.network


def load_student(folder: Path, device: torch.device) -> LoadedStudent:
    """Load a student from a folder written by `exporting.export`."""
    card = student_card.read(folder)
    found = checkpoint.read(CheckpointTeacher(path=str(folder)), device, card.kind)
    return LoadedStudent(
        student=KINDS[card.kind](found.network).eval(),
        sampler=card.sampler,
        t_grids=card.t_grids,
        shape=found.shape,
        num_classes=found.conditioning.count,
        null_class=checkpoint.null_class(found.conditioning),
        digest=found.digest,
        description=found.description,
        fitted=card.fitted,
    )
