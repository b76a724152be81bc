"""The folders of LoRA students. They hold what was trained, and not the weights of the teacher's network.

`load` puts the adapters on the frozen network of the teacher. Several students, and the teacher, then share one network
in memory.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.core.errors import InputError, RunError
from distill.exchange import student_card
from distill.exchange.student_card import StudentCard
from distill.flow.conditioning import with_range
from distill.networks.adapters import ends
from distill.networks.experts import Experts
from distill.networks.sharing import ADAPTER, is_shared
from distill.networks.two_times import TwoNetworks, TwoTimes
from distill.students import lora_comfy, lora_weights, native, native_folder
from distill.students.native_folder import ACCELERATION, SECOND_TIME
from distill.students.stock import Stock
from distill.teachers import layout
from distill.teachers.loaded import LoadedTeacher, Packaging
from distill.teachers.network_field import EdmField, NetworkField
from distill.teachers.read import unreadable

COMFY = "comfyui"  # folder of the files for ComfyUI
LONGEST = 100  # characters of their names, without the endings
NEW_LAYERS = "new_layers.safetensors"  # layers of an acceleration that replace those of the base


def write(network: nn.Module, folder: Path, packaging: Packaging, card: StudentCard, stock: Stock) -> StudentCard:
    """Writes what was trained of a student's network, and its scheduler config, to a new folder.

    packaging: of its teacher.

    Returns the card with the class of the network, and how the pipeline of its teacher samples it.
    """
    weights = lora_weights.from_network(network)
    base = native.base_of(network)
    lora_weights.write_diffusers(folder, weights)
    if not lora_comfy.why_not(weights, base):
        (folder / COMFY).mkdir()
        lora_comfy.write_comfy(folder / COMFY, _file_name(card.name), weights, base)
    for path, module in _further(network):
        tensors = {name: each.detach().contiguous() for name, each in module.items()}
        (folder / path).parent.mkdir(exist_ok=True)
        save_file(tensors, folder / path)
    if isinstance(network, TwoNetworks):
        lora_weights.write_diffusers(folder / ACCELERATION, lora_weights.from_network(network.acceleration))
    scheduler = folder / "scheduler" / layout.SCHEDULER
    scheduler.parent.mkdir()
    scheduler.write_text(json.dumps(stock.scheduler_or(packaging), indent=2, sort_keys=True) + "\n")
    first = base.transformer if isinstance(base, Experts) else base
    facts = card.lora["student"].model_copy(update={"targets": sorted(ends(weights.layers))})
    return card.model_copy(
        update={
            "lora": {**card.lora, "student": facts},
            "network": type(first).__name__,
            "component": native.convention_for(base).folder,
            "stock": stock.call,
            "embedded_guidance": packaging.embedded_guidance,
            # what the card says of the folder that an extracted LoRA comes from
            "pipeline": "",
            "size": [],
            "dtype": "",
        }
    )


def _file_name(title: str) -> str:
    """The name of a student as that of a file, without its ending, that `distill publish` accepts."""
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", title).strip(".-")
    return found[:LONGEST] or "student"


def compare(network: nn.Module, folder: Path) -> None:
    """RunError unless the adapters that are read again are the same, bit for bit."""
    parts = {folder: network}
    if isinstance(network, TwoNetworks):
        parts[folder / ACCELERATION] = network.acceleration
    for place, part in parts.items():
        ours, theirs = lora_weights.from_network(part), lora_weights.read_diffusers(place)
        different = ours.layers.keys() ^ theirs.layers.keys()
        different |= {
            name
            for name, layer in ours.layers.items()
            if name in theirs.layers and not _same(layer, theirs.layers[name])
        }
        if different:
            raise RunError(
                f"export failed: other adapters of {min(different)} were read than were written; nothing was exported"
            )


def _same(ours: lora_weights.LoraLayer, theirs: lora_weights.LoraLayer) -> bool:
    equal = torch.equal(ours.down, theirs.down) and torch.equal(ours.up, theirs.up)
    return equal and ours.alpha == theirs.alpha


def _further(network: nn.Module) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The files of what is new in a network besides adapters, with their tensors."""
    if isinstance(network, TwoTimes):
        yield SECOND_TIME, network.gap.state_dict()
    if isinstance(network, TwoNetworks):
        yield f"{ACCELERATION}/{NEW_LAYERS}", _new_layers(network.acceleration)


def _new_layers(network: nn.Module) -> dict[str, Tensor]:
    return {name: each for name, each in network.named_parameters() if not is_shared(each) and ADAPTER not in name}


def refuse_other_base(base: LoadedTeacher, card: StudentCard, folder: Path) -> None:
    """InputError if a LoRA student does not belong to a teacher."""
    if base.base_digest != card.base_digest:
        raise InputError(
            f"{folder} holds the adapters of another network than the {base.description}: it was trained on "
            f"{card.teacher or 'a teacher'} with the weights {card.base_digest[:12]}, and these are "
            f"{base.base_digest[:12]}; give that teacher"
        )


def card_of(folder: Path) -> StudentCard:
    """The card of a LoRA student. InputError if the student in this folder is another one."""
    card = student_card.read(folder)
    if "student" not in card.lora:
        raise InputError(
            f"{folder} is not a LoRA student: its folder has all weights; to make a LoRA of it: distill extract"
        )
    return card


def load(folder: Path, card: StudentCard, base: LoadedTeacher) -> tuple[native.NativeStudent, str]:
    """The student in a folder, on the weights of its teacher, and the student's digest."""
    refuse_other_base(base, card, folder)
    assert base.network is not None
    network, call = native.without_adapters(base.network), native.call_of(base)
    weights = lora_weights.read_diffusers(folder)
    if card.kind == "acceleration":
        student: native.NativeStudent = native.acceleration(network, call)
        lora_weights.add_to(student.network.velocity, weights)
        lora_weights.add_to(student.network.acceleration, lora_weights.read_diffusers(folder / ACCELERATION))
        _load_new_layers(student.network.acceleration, folder / ACCELERATION / NEW_LAYERS)
    else:
        lora_weights.add_to(network, weights)
        student = native.velocity(network, call)
        if card.kind == "flow_map":
            to_data = native_folder.is_to_data(card)
            if to_data:
                student = native.flow_map(network, call, 0, to_data)
            else:
                student = native_folder.flow_map(network, call, folder / SECOND_TIME, card)
    return student, digest(base, folder)


def as_teacher(folder: Path, base: LoadedTeacher) -> LoadedTeacher:
    """A LoRA student as a teacher, in the schedule of its own teacher `base`, to which its adapters are added."""
    card = student_card.read(folder)
    refuse_other_base(base, card, folder)
    assert base.network is not None and isinstance(base.field, EdmField | NetworkField)
    lora_weights.add_to(base.network, lora_weights.read_diffusers(folder))
    return replace(
        base,
        digest=digest(base, folder),
        description=f"the LoRA student {folder.name} of {base.description}",
        guidance_scale=card.guidance_scale,
        given=with_range(base.given, card.guidance_range),
        unconditional=card.unconditional,
        license=card.license or base.license,
    )


def digest(base: LoadedTeacher, folder: Path) -> str:
    """SHA-256 over the digest of the base and the student's files of weights."""
    found = [base.digest]
    for path in sorted(folder.rglob("*.safetensors")):
        if path.parent.name != COMFY:
            with path.open("rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256(" ".join(found).encode()).hexdigest()


def _load_new_layers(network: nn.Module, path: Path) -> None:
    try:
        tensors = load_file(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise InputError(f"{path} is damaged; copy or download it again") from error
    own = _new_layers(network)
    if {name: each.shape for name, each in tensors.items()} != {name: each.shape for name, each in own.items()}:
        raise InputError(f"{path} does not fit the network of its teacher; copy or download it again")
    if not all(each.isfinite().all() for each in tensors.values()):
        raise InputError(f"{path} contains NaN or infinity; copy or download it again")
    with torch.no_grad():
        for name, each in own.items():
            each.copy_(tensors[name])
