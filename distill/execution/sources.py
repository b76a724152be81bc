"""The inputs of a stage: its teacher, its data, the paths to solve. `batches` has the batches to train on."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distill import caches, pairs, teachers
from distill.core.errors import InputError, RunError
from distill.core.printing import say_error
from distill.core.records import read_json
from distill.data import DataSet, load_data, load_prompts
from distill.data.encoded import sample_shape
from distill.exchange import student_card
from distill.flow.conditioning import ConditionTable
from distill.networks.adapters import require_peft
from distill.runs import cached
from distill.runs.cached import UsedCache
from distill.runs.run_store import RunPaths
from distill.spec import cacheuse
from distill.spec.model import (
    CacheStage,
    CheckpointTeacher,
    EvaluateStage,
    RunSpec,
    Stage,
    TeacherSpec,
    TrainStage,
)
from distill.spec.resolved import Resolved
from distill.teachers import LoadedTeacher, conditions
from distill.teachers.dispatching import dispatched
from distill.teachers.of_students import stage_teacher, weak_teacher
from distill.training.world import World


@dataclass(frozen=True)
class Inputs:
    """The loaded inputs of a stage; None where it needs none or there is none."""

    teacher: LoadedTeacher | None
    """the student of an earlier stage, or the teacher of the spec; with the weak model, if the stage has one"""
    data: DataSet | None
    own: LoadedTeacher | None
    """the teacher of the spec if it is in closed form: its exact samples replace data"""
    times: list[float] | None
    """times of the states of the pairs to train on, if they are the same for all"""
    places: dict[str, str]
    """where teacher, data and prompts were read, or their kinds, for messages"""
    prompts: UsedCache | None = None
    """the cache with the conditions of the teacher, if the run has one"""
    texts: Sequence[str] | None = None
    """the prompts of that cache, in its order, for an evaluation"""


def load(run: RunPaths, resolved: Resolved, name: str, device: torch.device, *, indexed: bool = True) -> Inputs:
    """Load the inputs of the stage `name` of a run. device: of the teacher. indexed: see `load_data`.

    Teachers are not probed: students are compared at export, and the spec's teacher is checked before a run starts.
    """
    spec, stage, needs = cached.with_conditions(resolved.spec, run), resolved.spec.stages[name], resolved.needs(name)
    used = cached.of_run(run, spec)
    assert not isinstance(stage, CacheStage)
    given: dict[str, TeacherSpec | None] = {"own": spec.teacher if resolved.spec.has_exact_teacher else None}
    if "teacher" in needs:
        given["teacher"] = stage_teacher(spec, stage, run.students)
    given["weak"] = weak_teacher(spec, stage, run.students)
    loaded = {role: _loaded(each, spec.teacher, device) for role, each in given.items() if each is not None}
    teacher, weak, own = loaded.get("teacher"), loaded.get("weak"), loaded.get("own")
    data = _data(run, resolved, name, teacher, indexed=indexed) if "data" in needs else None
    texts = None
    if isinstance(stage, EvaluateStage) and "prompts" in used:
        texts = load_prompts(spec.data, run.root if indexed else run.root.parent, indexed=indexed)
    if (prompts := used.get("prompts")) is not None:
        cached.refuse_other(run, prompts, conditions.read(prompts.place(run.root.parent)).digest)
    times = _times(run, name, stage) if isinstance(stage, TrainStage) else None
    places = _places(run, spec, used, given.get("teacher"))
    if teacher is not None:
        teacher = replace(teacher, weak=weak, form=stage.guidance if isinstance(stage, TrainStage) else None)
    return Inputs(teacher, data, own, times, places, prompts, texts)


def _loaded(given: TeacherSpec, own: TeacherSpec | None, device: torch.device) -> LoadedTeacher:
    """A teacher, which may be a LoRA student of `own`, the teacher of the spec."""
    lora = None if own is None or not isinstance(given, CheckpointTeacher) else Path(given.path)
    if lora is None or not student_card.is_lora(lora):
        lora, base = None, given
    else:
        assert isinstance(own, CheckpointTeacher), "a LoRA student is one of a checkpoint"
        base = own.with_guidance(student_card.read(lora), lora)
        require_peft()
    found = teachers.load_teacher(base, device, probe=False)
    if lora is None:
        return found
    from distill.students import lora_folder  # imports PEFT, which takes seconds

    return lora_folder.as_teacher(lora, found)


def _places(
    run: RunPaths, spec: RunSpec, used: Mapping[cached.What, UsedCache], teacher: TeacherSpec | None
) -> dict[str, str]:
    places: dict[str, str] = {what: str(cache.place(run.root.parent)) for what, cache in used.items()}
    places["data"] = places.get("latents", spec.data.place or spec.data.kind)
    if teacher is not None:
        places["teacher"] = teacher.path if isinstance(teacher, CheckpointTeacher) else teacher.kind
    return places


def _data(
    run: RunPaths, resolved: Resolved, name: str, teacher: LoadedTeacher | None, *, indexed: bool
) -> DataSet | None:
    """The data of a stage: the latents in the run's cache, if it has some and the stage uses them.

    InputError if another autoencoder than the teacher's has made them.
    """
    spec, used = resolved.spec, cached.of_run(run, resolved.spec).get("latents")
    if used is not None and cacheuse.reads_latents(resolved, name):
        digest = None if teacher is None else teacher.codec.digest
        found = caches.open_latents(used.place(run.root.parent), spec.seed, codec_digest=digest)
        cached.refuse_other(run, used, found.digest)
        return found
    read = spec.data if isinstance(spec.stages[name], TrainStage) else spec.data.in_one_size()
    return load_data(read, spec.seed, run.root if indexed else run.root.parent, indexed=indexed)


@contextmanager
def opened(
    run: RunPaths, resolved: Resolved, name: str, device: torch.device, *, indexed: bool, whole: bool
) -> Iterator[Inputs]:
    """A context with the inputs of a stage (see `load`), with a teacher that can be called on `device`.

    whole: all weights of the teacher must be on `device`; else it may be larger than the device's memory.
    """
    inputs = load(run, resolved, name, device if whole else torch.device("cpu"), indexed=indexed)
    called = {} if whole or inputs.teacher is None else {"offload": inputs.teacher, "offload-weak": inputs.teacher.weak}
    with ExitStack() as stack:
        for folder, each in called.items():
            if each is not None and each.network is not None:
                stack.enter_context(dispatched(each.network, device, run.stage(name).root / folder))
        yield inputs


def _times(run: RunPaths, name: str, stage: TrainStage) -> list[float] | None:
    """The times of the states of a stage's pairs, or those that the stage has noted if the pairs were deleted."""
    found = [pairs.manifest.read(run.stage(each).pairs) for each in stage.pair_shares]
    times = [each.times for each in found if each is not None]
    if len(times) < len(found):
        kept: list[float] | None = read_json(run.stage(name).times) if run.stage(name).times.exists() else None
        return kept
    return times[0] if times and all(each == times[0] for each in times) else None


def check_shapes(teacher: LoadedTeacher, data: DataSet) -> None:
    """InputError if the data does not have the teacher's shape and classes. For unused labels see `check_labels`."""
    shape = sample_shape(data, teacher.codec)
    if data.encoded and shape != teacher.shape:
        raise InputError(
            f"data '{data.name}' has latents of shape {list(shape)}, but the teacher ({teacher.description}) takes "
            f"{list(teacher.shape)}; {_hint(shape, teacher.shape)}"
        )
    if shape != teacher.shape:
        raise InputError(
            f"data '{data.name}' has samples of shape {list(data.shape)}, but the teacher ({teacher.description}) "
            f"makes {list(teacher.shape)}; use data of the teacher's shape (data.size, data.channels) or another "
            "teacher"
        )
    if data.prompts is not None and teacher.num_classes is not None:
        check_prompts(teacher, data.name, len(data.prompts))
    if isinstance(teacher.given, ConditionTable) and data.num_classes != teacher.num_classes:
        raise InputError(
            f"data '{data.name}' has {data.num_classes or 'no'} classes, but the teacher ({teacher.description}) has "
            f"{teacher.num_classes} prompts: the rows of its file of teacher.conditions. Samples with label i belong "
            "to row i; give data with a label for each row, or a file with one row for each class"
        )
    if teacher.num_classes is not None and data.num_classes != teacher.num_classes:
        raise InputError(
            f"data '{data.name}' has {data.num_classes or 'no'} classes, but the teacher ({teacher.description}) "
            f"has {teacher.num_classes}; give labelled data with the teacher's classes, or an unconditional teacher"
        )


def check_prompts(teacher: LoadedTeacher, name: str, count: int) -> None:
    """InputError if the teacher does not take the prompts of the data. count: the number of different prompts."""
    if not isinstance(teacher.given, ConditionTable):
        takes = "is unconditional" if teacher.num_classes is None else "is conditioned on classes"
        raise InputError(
            f"data '{name}' has prompts, but the teacher ({teacher.description}) {takes}; use data without prompts, or "
            "a teacher that takes them"
        )
    if count != teacher.num_classes:
        raise InputError(
            f"data '{name}' has {count:,} prompts, but teacher.conditions of the teacher "
            f"({teacher.description}) has {teacher.num_classes:,} rows; row i must belong to the i-th prompt of the "
            "data, so encode these prompts, or let a cache stage do it, without teacher.conditions"
        )


def _hint(latents: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What to do about latents of another shape than the teacher's."""
    if len(latents) != len(wanted):
        one = "true" if len(latents) < len(wanted) else "false"
        return f"data.one_per_file: {one} if each file holds {'one sample' if one == 'true' else 'many samples'}"
    if latents == (2 * wanted[0], *wanted[1:]):
        return "set data.moments: true if these are mean and log variance"
    if latents[1:] != wanted[1:] and latents[0] == wanted[0]:
        return "give latents of this size, or their size in pixels in teacher.size"
    return "give latents of the teacher's autoencoder, or another teacher"


def check_labels(spec: RunSpec, teacher: LoadedTeacher, data: DataSet) -> None:
    """InputError if labels or captions of the spec have no effect, because the teacher is unconditional; else
    `note_labels`.

    Labels have an effect if there is a new network, which may learn them, or an evaluation, whose features use them.
    """
    if data.prompts is not None and teacher.num_classes is None:
        raise InputError(
            f"the captions of data '{data.name}' have no effect: the teacher ({teacher.description}) is unconditional; "
            "remove the setting that reads them from data, or give a teacher that takes prompts"
        )
    elsewhere = [stage for stage in spec.stages.values() if isinstance(stage, EvaluateStage) or _has_own_network(stage)]
    given = spec.data.label_field
    if given is not None and _left_out(teacher, data) and not elsewhere:
        raise InputError(
            f"data.{given}={getattr(spec.data, given)} has no effect: the teacher ({teacher.description}) is "
            "unconditional; remove it, or give a teacher with classes"
        )
    note_labels(teacher, data)


def note_labels(teacher: LoadedTeacher, data: DataSet) -> None:
    """Print a note to stderr if the data has labels and the teacher is unconditional."""
    if not _left_out(teacher, data):
        return
    labels = "classes" if data.prompts is None else "prompts"
    say_error(
        f"note: data '{data.name}' has {data.num_classes} {labels}, but the teacher ({teacher.description}) is "
        "unconditional: its students are trained without labels"
    )


def _left_out(teacher: LoadedTeacher, data: DataSet) -> bool:
    return data.num_classes is not None and teacher.num_classes is None


def _has_own_network(stage: Stage) -> bool:
    return isinstance(stage, TrainStage) and stage.network is not None


def refuse_different(inputs: Mapping[str, str], places: Mapping[str, str], world: World) -> None:
    """RunError if a rank has read other inputs than rank 0. All ranks must call this.

    inputs: digests by name. places: where each was read, by name.
    """
    if world.size == 1 or not inputs:
        return
    ours = torch.tensor([list(hashlib.sha256(digest.encode()).digest()) for digest in inputs.values()])
    first = ours.clone()
    with world.contact("comparing inputs"):
        world.share([first])
    other = world.meet("after comparing inputs", *(ours != first).any(1).tolist())
    different = [f"{name} ({places[name]})" for name, is_other in zip(inputs, other, strict=True) if is_other]
    if different:
        raise RunError(
            f"the ranks have read different inputs: {', '.join(different)}; the files changed while they were read, or "
            "differ between machines. No step was trained with them; make the files identical, then resume"
        )
