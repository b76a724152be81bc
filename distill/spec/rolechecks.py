"""Validation of the adapters and of the smaller student of a train stage. Does not import torch."""

from collections.abc import Iterator

from distill.spec.model import TrainStage
from distill.spec.resolved import Resolved
from distill.spec.rolespec import LoraSpec

STUDENT = "student"  # the name of the student in every recipe


def mistakes(found: Resolved, stage: TrainStage, where: str) -> Iterator[str]:
    """The mistakes in `lora` and `student` that can be found without the teacher's network."""
    if stage.student is not None:
        yield from _smaller(found, stage, where)
    if stage.lora:
        yield from _lora(found, stage, f"{where}.lora")


def _smaller(found: Resolved, stage: TrainStage, where: str) -> Iterator[str]:
    if stage.network is not None:
        yield f"{where}: student and network are both given, but only one of them can be trained; remove one"
    if found.has_exact_teacher(stage):
        yield f"{where}.student: the teacher is known in closed form and has no network class; use network"
    if STUDENT in stage.lora:
        yield (
            f"{where}.lora.{STUDENT}: adapters change the teacher's weights, but the weights of `student` are new; "
            "remove one of them"
        )
    if (kind := found.kind(stage.init)) is not None and not kind.is_field:
        yield (
            f"{where}.student: no smaller student can be made of the student of init '{stage.init}', because it is "
            f"{kind.words}; start from a velocity student, or from the teacher"
        )


def _lora(found: Resolved, stage: TrainStage, where: str) -> Iterator[str]:
    if found.has_exact_teacher(stage):
        yield (
            f"{where}: the teacher is known in closed form, so there is no network that could get adapters; remove it"
        )
        return
    if stage.network is not None:
        yield (
            f"{where}: adapters change the weights of the teacher, but the weights of `network` are new; remove one of "
            "them"
        )
        return
    if STUDENT in stage.lora:
        yield from _base(found, stage, where)
    for role, lora in stage.lora.items():
        yield from _start(found, stage, role, lora, f"{where}.{role}")


def _base(found: Resolved, stage: TrainStage, where: str) -> Iterator[str]:
    """The exported adapters are loaded on the spec's teacher, so they must have been trained on its weights."""
    field = "teacher" if stage.init is None else "init"
    other = found.spec.stages.get(stage.init or stage.teacher or "")
    if isinstance(other, TrainStage) and STUDENT not in other.lora:
        yield (
            f"{where}.{STUDENT}: the student of {field} '{stage.init or stage.teacher}' is trained in full, but "
            "adapters can be loaded only on the spec's teacher; name a stage that has lora.student, or remove it"
        )


def _start(found: Resolved, stage: TrainStage, role: str, lora: LoraSpec, where: str) -> Iterator[str]:
    """The mistakes in what the adapters of a role start from."""
    field = "init" if role == STUDENT and stage.init is not None else "teacher"
    origin = stage.init if field == "init" else stage.teacher
    other = found.spec.stages.get(origin or "")
    before = other.lora.get(STUDENT) if isinstance(other, TrainStage) else None
    if before is not None and lora.path is not None:
        yield f"{where}.path: the adapters start from those of {field} '{origin}', so this has no effect; remove it"
    if before is not None and before.rank != lora.rank:
        yield (
            f"{where}.rank: {lora.rank} given, but the adapters start from those of {field} '{origin}', which have the "
            f"rank {before.rank}; use the same rank"
        )
