"""`distill merge` and `distill unmerge`: student folders with a LoRA in their weights, or without it."""

from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer as PeftLayer

from distill import teachers
from distill.core.atomic import new_folder
from distill.core.errors import InputError, RunError
from distill.exchange import stock_students, student_card
from distill.exchange.student_card import StudentCard
from distill.spec.model import CheckpointTeacher
from distill.students import lora_folder, lora_weights, native, native_folder
from distill.students.exporting import export
from distill.students.lora_weights import LoraWeights
from distill.students.merging import unmerge
from distill.students.packaged import copy_files
from distill.teachers import checkpoint
from distill.teachers.of_students import in_size_of

CPU = torch.device("cpu")


def merge_student(folder: Path, spec: CheckpointTeacher, out: Path, scale: float = 1.0) -> None:
    """Writes a LoRA student as a student with all weights: those of its base in float32, with the LoRA merged.

    spec: the base. Conditions are not needed. Raises InputError if `folder` is not a LoRA student or `spec` not its
    base; RunError if the new folder cannot be written or is not loaded by diffusers as it was written.
    """
    card = lora_folder.card_of(folder)
    spec = spec.with_guidance(card, folder)
    base = teachers.load_teacher(in_size_of(card.shape, spec) or spec, CPU, probe=False, prompts=1)
    student, _ = lora_folder.load(folder, card, base)
    packaging = base.packaging
    del base  # the student soon has weights of its own
    for module in student.modules():
        if isinstance(module, PeftLayer):
            for adapter in module.scaling:
                module.scaling[adapter] *= scale
    native.unshared(student)  # merges
    lora = {role: each for role, each in card.lora.items() if role != "student"}
    metrics = card.metrics if scale == 1 else {}
    card = card.model_copy(update={"lora": lora, "base_digest": "", "metrics": metrics})
    export(student, out, card, packaging)


def unmerge_student(folder: Path, lora: LoraWeights, out: Path, scale: float = 1.0) -> None:
    """Writes a student with all weights again, in their data type, without a LoRA that was merged with this scale.

    Raises InputError if the LoRA does not fit the student; RunError if the new folder cannot be written.
    """
    card, parts = _with_all_weights(folder), lora.parts
    kept = [name for name in card.files if name.partition("/")[0] not in {*parts, student_card.README}]
    try:
        with new_folder(out) as new:
            copy_files(folder, new, kept)
            for component, layers in parts.items():
                if not (folder / component).is_dir():
                    raise InputError(
                        f"the LoRA is one of a network {component}, which {folder} does not have; give a LoRA that was "
                        "merged into this student"
                    )
                network = native_folder.network_in(folder / component, checkpoint.DTYPES[card.dtype or "float32"])
                unmerge(network, LoraWeights(lora.network, component, layers), scale)
                network.save_pretrained(new / component, max_shard_size=native_folder.SHARD)
            student_card.write(new, card.model_copy(update={"metrics": {}}))
    except OSError as error:
        raise RunError(f"cannot write {out} from {folder}: {error.strerror}; nothing was kept") from error


def lora_of(path: Path) -> LoraWeights:
    """The LoRA in a file, or in the folder of a LoRA student."""
    if not path.exists():
        raise InputError(f"--lora {path}: does not exist; give a .safetensors file, or the folder of a LoRA student")
    return lora_weights.read_diffusers(path)


def _with_all_weights(folder: Path) -> StudentCard:
    """The card of a student whose folder has all weights of a network of a latent-space pipeline.

    InputError if the student is another one, or if its folder has missing, damaged or unknown files.
    """
    card = student_card.read(folder)
    if "student" in card.lora:
        raise InputError(f"{folder} is a LoRA student, whose LoRA is not merged; to merge it: distill merge")
    if not card.is_native:
        raise InputError(
            f"{folder} has a network of its own class, into which no LoRA is merged; give a student that has the "
            "network class of its teacher's pipeline"
        )
    if card.kind == "acceleration":
        raise InputError(
            f"{folder} has a second network for the acceleration, into which a LoRA of its own was merged, and unmerge "
            "takes out one LoRA; give a student of kind velocity or flow_map"
        )
    stock_students.refuse_card(card)
    return student_card.verify(folder)
