"""`distill extract`: LoRA students from a student with all weights, and how close their samples come to its own."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import teachers
from distill.core.atomic import new_folder
from distill.core.errors import InputError, RunError
from distill.exchange import student_card
from distill.exchange.student_card import LoraFacts, StudentCard
from distill.networks.two_times import ToData, TwoTimes
from distill.spec.model import CheckpointTeacher
from distill.students import lora_verify, lora_weights, native
from distill.students.comparing import Difference, difference, drawn_samples, pictures
from distill.students.exporting import export
from distill.students.extract import decompose, refuse_ranks, relative_change
from distill.students.init import StudentInit
from distill.students.loaded import LoadedStudent, load_student
from distill.students.lora_weights import LoraWeights
from distill.students.merging import merge
from distill.teachers.loaded import LoadedTeacher

UNRELATED = 1.0  # change relative to the base; 1.4 for networks that have nothing in common
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ExtractedRank:
    """One row of the table. rank 0: the base alone.

    size: of the file in bytes. kept: share of the squared change. difference: of its samples to those of the student.
    """

    rank: int
    size: int
    kept: float
    difference: Difference


@dataclass(frozen=True)
class ExtractedStudent:
    """What was extracted.

    compared: images or latents. change: the root of the squared change, relative to that of the base's weights. others:
    the share of the squared change of every parameter that a LoRA cannot hold, the largest first. layers: by rank, the
    share of the squared change of each layer that is kept.
    """

    rows: list[ExtractedRank]
    steps: int
    samples: int
    compared: str
    change: float
    others: dict[str, float]
    layers: dict[int, dict[str, float]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def extract(
    folder: Path,
    spec: CheckpointTeacher,
    ranks: Sequence[int],
    out: Path,
    *,
    samples: int,
    seed: int,
    device: torch.device,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> ExtractedStudent:
    """Writes one LoRA student for each rank to `out`/rank-R. Each is loaded again where distill cannot be imported.

    Two networks are in memory: the base in the data type of `spec` on the CPU, and the student in float32 on `device`.
    tell: is told how many parameters are decomposed, and their number.

    Raises InputError if the student has no weights of a network like that of `spec`, or for an invalid rank; RunError
    if a LoRA cannot be written, or not be loaded again.
    """
    card = _suitable(folder)
    spec = spec.with_guidance(card, folder)
    base = teachers.load_teacher(spec, CPU, probe=False)
    assert base.network is not None
    if card.network != (theirs := _named(base.network)[0]):
        raise InputError(
            f"{folder} has a {card.network}, but {spec.where} a {theirs}; give the teacher that it was trained from"
        )
    student = load_student(folder, device, spec)
    refuse_ranks(native.base_of(student.network), ranks)
    relative = relative_change(base.network, native.base_of(student.network))
    if relative >= UNRELATED:
        raise InputError(
            f"{spec.where} is another base: the weights of {folder} differ from its weights by {relative:.0%} of their "
            "size; give the teacher that the student was trained from"
        )
    own = _drawn(student, card, samples, seed, device)
    network, before = native.base_of(student.network), dict(base.network.named_parameters())
    change = decompose(base.network, network, ranks, device, lambda done: tell(done, len(before)))

    def row(rank: int, size: int, kept: float) -> ExtractedRank:
        return ExtractedRank(
            rank, size, kept, difference(_drawn(student, card, samples, seed, device), own, base.codec)
        )

    rows = []
    try:
        with new_folder(out) as new:
            _restore(network, before)
            rows.append(row(0, 0, 0.0))
            for rank in sorted(set(ranks)):
                lora = change.lora(rank, *_named(base.network))
                _restore(network, before)
                merge(network, lora)
                place = new / f"rank-{rank}"
                facts = {"student": LoraFacts(rank=rank, alpha=rank, targets=[]), **card.lora}
                described = card.model_copy(update={"lora": facts, "base_digest": base.base_digest, "metrics": {}})
                adapted = _with_adapters(base, lora, student)
                init = StudentInit(base, None, base.shape, base.num_classes, 0, base)
                prove = partial(lora_verify.prove, student=adapted, init=init)
                export(adapted, place, described, base.packaging, prove)
                size = sum(each.stat().st_size for each in place.rglob(lora_weights.FILE))
                rows.append(row(rank, size, change.kept(rank)))
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}; nothing was kept") from error
    return ExtractedStudent(
        rows=rows,
        steps=card.fewest_steps,
        samples=samples,
        compared="latents" if base.codec.is_identity else "images",
        change=relative,
        others=change.shares,
        layers={rank: {name: each.kept(rank) for name, each in change.layers.items()} for rank in sorted(set(ranks))},
    )


def _suitable(folder: Path) -> StudentCard:
    """The card of a student that a LoRA can be extracted from. InputError for others."""
    card = student_card.read(folder)
    if "student" in card.lora:
        raise InputError(f"{folder} is a LoRA student already; to change its rank, first merge it: distill merge")
    if not card.is_native:
        raise InputError(
            f"{folder} has a network of its own class, and a LoRA changes the network of a pipeline in diffusers; give "
            "a student that was trained from a latent-space teacher"
        )
    if card.kind == "acceleration":
        raise InputError(
            f"{folder} has a second network for the acceleration, which is no change of its teacher's; give a student "
            "of kind velocity or flow_map"
        )
    return card


def _with_adapters(base: LoadedTeacher, lora: LoraWeights, student: LoadedStudent) -> native.NativeStudent:
    """The weights of the base, which are shared, with adapters; and the second time of the student, if it has one."""
    assert base.network is not None
    network = native.without_adapters(base.network)
    lora_weights.add_to(network, lora)
    call = native.call_of(base)
    if isinstance(student.network, ToData):
        return native.flow_map(network, call, 0, to_data=True)
    if not isinstance(student.network, TwoTimes):
        return native.velocity(network, call)
    gap = student.network.gap
    found = native.flow_map(network, call, 0, waves=gap.config.waves, guidance_range=gap.config.guidance_range)
    found.network.gap.load_state_dict(gap.state_dict())
    return found


def _drawn(student: LoadedStudent, card: StudentCard, count: int, seed: int, device: torch.device) -> Tensor:
    found = drawn_samples(student, steps=card.fewest_steps, seed=seed, count=count, device=device)
    return pictures(found, student.codec, device)


@torch.no_grad()
def _restore(network: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    """Sets the parameters of a network to those of the base."""
    parameters = dict(network.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)


def _named(network: nn.Module) -> tuple[str, str]:
    """The class of a network, and its folder in the pipeline."""
    _, first = next(iter(native.parts_of(network)))
    return type(first).__name__, native.convention_for(network).folder
