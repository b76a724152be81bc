"""`distill merge` and `distill unmerge`: student folders with a LoRA in their weights, or without it."""

import shutil
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer as PeftLayer

from distill import teachers
from distill.core.atomic import new_folder
from distill.core.errors import InputError
from distill.exchange import student_card
from distill.exchange.student_card import StudentCard
from distill.spec.model import CheckpointTeacher
from distill.students import lora_folder, lora_weights, native, native_folder
from distill.students.exporting import export
from distill.students.lora_weights import LoraWeights
from distill.students.merging import unmerge
from distill.teachers.of_students import in_size_of

CPU = torch.device("cpu")


def merge_student(folder: Path, spec: CheckpointTeacher, out: Path, scale: float = 1.0) -> None:
    """Writes a LoRA student as a student with all weights: those of its base in float32, with the LoRA merged.

    spec: the base. Conditions are not needed. Raises InputError if `folder` is not a LoRA student or `spec` not its
    base; RunError if the new folder cannot be written or is not loaded by diffusers as it was written.
    """
    card = lora_folder.card_of(folder)
    base = teachers.load_teacher(in_size_of(card.shape, spec) or spec, CPU, probe=False, prompts=1)
    student, _ = lora_folder.load(folder, card, base)
    for module in student.modules():
        if isinstance(module, PeftLayer):
            for adapter in module.scaling:
                module.scaling[adapter] *= scale
    native.unshared(student)  # merges
    lora = {role: each for role, each in card.lora.items() if role != "student"}
    metrics = card.metrics if scale == 1 else {}
    card = card.model_copy(update={"lora": lora, "base_digest": "", "metrics": metrics})
    export(student, out, card, base.packaging)


def unmerge_student(folder: Path, lora: LoraWeights, out: Path, scale: float = 1.0) -> None:
    """Writes a student with all weights again, without a LoRA that was merged into it with this scale.

    Raises InputError if the LoRA does not fit the student.
    """
    card = _with_all_weights(folder)
    with new_folder(out) as new:
        parts = lora.parts
        shutil.copytree(folder, new, dirs_exist_ok=True, ignore=lambda at, names: _parts(folder, at, names, {*parts}))
        for component, layers in parts.items():
            if not (folder / component).is_dir():
                raise InputError(
                    f"the LoRA is one of a network {component}, which {folder} does not have; give a LoRA that was "
                    "merged into this student"
                )
            network = native_folder.network_in(folder / component)
            unmerge(network, LoraWeights(lora.network, component, layers), scale)
            network.save_pretrained(new / component, max_shard_size=native_folder.SHARD)
        student_card.write(new, card.model_copy(update={"metrics": {}}))


def lora_of(path: Path) -> LoraWeights:
    """The LoRA in a file, or in the folder of a LoRA student."""
    if not path.exists():
        raise InputError(f"--lora {path}: does not exist; give a .safetensors file, or the folder of a LoRA student")
    return lora_weights.read_diffusers(path)


def _with_all_weights(folder: Path) -> StudentCard:
    """The card of a student whose folder has all weights of a network of a latent-space pipeline."""
    card = student_card.read(folder)
    if "student" in card.lora:
        raise InputError(f"{folder} is a LoRA student, whose LoRA is not merged; to merge it: distill merge")
    if not card.is_native:
        raise InputError(
            f"{folder} has a network of its own class, into which no LoRA is merged; give a student that has the "
            "network class of its teacher's pipeline"
        )
    return card


def _parts(folder: Path, at: str, names: list[str], written: set[str]) -> list[str]:
    """What is not copied: the networks that are written again, at the top of the folder, and the card."""
    own = {*written, student_card.FILE_NAME, student_card.README}
    return [name for name in names if Path(at) == folder and name in own]
