"""Builds the networks of a train stage, to see whether they fit together and what they will cost."""

import weakref
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn

from distill.core.errors import InputError
from distill.data import DataSet
from distill.data.encoded import codec_of, sample_shape
from distill.flow.codecs import PIXELS
from distill.flow.conditioning import guidance_of
from distill.flow.interpolants import linear
from distill.networks.quantised import held_bytes
from distill.networks.sharing import has_base, is_shared
from distill.networks.velocity import TIME_SCALE, VelocityStudent
from distill.protocols import Adapter, Copy, Frozen, Recipe
from distill.spec import registry
from distill.spec.guidancespec import input_mistake
from distill.spec.kinds import STUDENTS
from distill.spec.model import TrainStage, UNetSpec
from distill.spec.resolved import ResolvedRecipe
from distill.students import adapting, native, smaller
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.loaded import KINDS, LoadedStudent
from distill.students.smaller import SmallerStudent
from distill.teachers import LoadedTeacher
from distill.teachers.network_field import EdmField, LinearCall, NetworkField
from distill.teachers.sample_sizes import obstacle
from distill.training import optimizers

Origin = LoadedTeacher | LoadedStudent  # what a later stage may start from; a velocity field may also teach it


@dataclass(frozen=True)
class BuiltNetworks:
    """The networks of a train stage, untrained. Those of latent-space pipelines have no values."""

    recipe: Recipe
    init: StudentInit
    trained: Mapping[str, nn.Module]
    frozen: Mapping[str, nn.Module]
    copies: Mapping[str, str]
    """target copies, and the networks that they copy"""
    merged: nn.Module
    """the student as it will be exported"""
    teacher: LoadedTeacher | None
    """the teacher that the recipe calls, if any"""
    base: int
    """see `Built`"""


@dataclass(frozen=True)
class Built:
    """The networks of a train stage, untrained."""

    student: Origin
    """as later stages would load it"""
    sizes: dict[str, list[int]]
    """elements of each trained parameter, by network"""
    still: dict[str, list[int]]
    """elements of each other parameter of these networks"""
    moments: int | None
    """bytes of the state of their optimizers, unless these are AdamW"""
    exported: int
    """number of elements in the exported student"""
    copies: list[str]
    """for each target copy, the network that it copies"""
    teacher: LoadedTeacher | None
    """the teacher that the recipe calls, if any"""
    base: int
    """bytes of the frozen weights that the trained networks share, unless they are those of this teacher"""
    smaller: SmallerStudent | None
    """what a student of another size is, if the stage asks for one"""


def of_stage(
    stage: TrainStage,
    recipe: ResolvedRecipe,
    teacher: LoadedTeacher | None,
    data: DataSet | None,
    earlier: Mapping[str, Built],
    look: Callable[[BuiltNetworks, bool], None],
    weak: LoadedTeacher | None = None,
) -> Built | None:
    """Build the networks of a train stage; None if they are known only after earlier stages. teacher: the spec's.

    InputError if they do not fit. Errors in a stage that starts from, or is taught by, the student of an earlier stage
    are not reported, because that student is not trained yet. A stage that trains adapters is an exception.

    look: called with the networks, and whether they are those that will be trained. weak: the weak model of
    autoguidance, if it is a checkpoint.
    """
    own_weak = None if stage.guidance is None else stage.guidance.weak
    before = {each for each in (stage.teacher, stage.init, own_weak) if each is not None}
    known = not before or (bool(stage.lora) and before <= earlier.keys())  # adapters start from what is known
    if stage.teacher is None and teacher is not None and own_weak is None:
        replace(teacher, form=stage.guidance, weak=weak).guided(recipe.guidance_range or recipe.guidance_scale)
    if stage.student is not None and (origin := _origin(stage, teacher, earlier)) is not None:
        smaller.check(origin, stage.student.config)
    try:
        found = build(stage, recipe, teacher, data, earlier, weak)
        look(found, known)
        return described(found, stage)
    except InputError:
        if known:
            raise
        return None


def build(
    stage: TrainStage,
    recipe: ResolvedRecipe,
    own: LoadedTeacher | None,
    data: DataSet | None,
    earlier: Mapping[str, Built],
    weak: LoadedTeacher | None = None,
) -> BuiltNetworks:
    """Build the recipe and the networks of a train stage. own: the spec's teacher. weak: see `of_stage`.

    InputError if they do not fit.
    """
    teacher = _student(earlier, stage.teacher) if stage.teacher is not None else own
    copied = stage.init is None and stage.network is None
    teacher = teacher if copied or "teacher" in recipe.needs else None
    if isinstance(teacher, LoadedStudent):
        raise InputError(f"{teacher.description} is not a teacher")
    if teacher is not None:
        if stage.guidance is not None and stage.guidance.weak is not None:
            student = _student(earlier, stage.guidance.weak)
            assert isinstance(student, LoadedTeacher), "checks.check lets no such stage through"
            weak = student
        teacher = replace(_without_values(teacher_on_linear_path(teacher)), form=stage.guidance, weak=weak)
    origin = _student(earlier, stage.init) if stage.init is not None else teacher
    init = start(stage, recipe, teacher, origin, data, 0)
    called = teacher if "teacher" in recipe.needs else None
    kept = called if calls_teacher(recipe, called) else None
    # A LoRA student of an earlier stage has the weights of the teacher.
    is_base = kept is not None and origin is not None and (origin is kept or _is_lora(origin))
    made: Recipe = recipe.module.Recipe(recipe.config, called)
    roles = made.networks(init)
    if registry.drops_condition(recipe.config):  # an error now if there is no null condition, and not in the first step
        init.null(init.conditioning.collate(torch.zeros(1, dtype=torch.int64)))
    trained = {name: each.module for name, each in adapting.trained(roles, stage.lora, init.seed, stage.recipe).items()}
    shared = {p for each in trained.values() for p in each.parameters() if is_shared(p)}
    made_as = roles["student"]
    return BuiltNetworks(
        recipe=made,
        init=init,
        trained=trained,
        frozen={name: role.module for name, role in roles.items() if isinstance(role, Frozen)},
        copies={name: role.of for name, role in roles.items() if isinstance(role, Copy)},
        merged=made_as.module if isinstance(made_as, Adapter) else trained["student"],
        teacher=kept,
        base=0 if is_base else held_bytes(shared),
    )


def described(found: BuiltNetworks, stage: TrainStage) -> Built:
    """What is known about the networks of a train stage, of which the student is frozen here."""
    init = found.init
    changed = {name: [p for p in each.parameters() if not is_shared(p)] for name, each in found.trained.items()}
    states = [optimizers.state_bytes(stage.optimizer, each) for each in found.trained.values()]
    sizes = {name: [p.numel() for p in each if p.requires_grad] for name, each in changed.items()}
    still = {name: [p.numel() for p in each if not p.requires_grad] for name, each in changed.items()}
    return Built(
        student=untrained(found.merged, init),
        sizes=sizes,
        still=still,
        moments=None if None in states else sum(each or 0 for each in states),
        exported=sum(p.numel() for p in found.merged.parameters() if not is_shared(p)),
        copies=[*found.copies.values()],
        teacher=found.teacher,
        base=found.base,
        smaller=None if init.changes is None or init.source is None else smaller.describe(init.source, init.changes),
    )


def start(
    stage: TrainStage,
    recipe: ResolvedRecipe,
    teacher: LoadedTeacher | None,
    origin: Origin | None,
    data: DataSet | None,
    seed: int,
) -> StudentInit:
    """The `Init` of a train stage. teacher: on the linear path. origin: the network whose weights are copied."""
    samples = teacher if "pairs" in recipe.needs or data is None else data
    assert samples is not None, "checks.check lets no such stage through"
    known = teacher or origin
    shape = samples.shape
    if data is not None and samples is data:
        shape = sample_shape(data, PIXELS if known is None else known.codec)
    starts = None if stage.network is not None or origin is None else guidance_of(origin.conditioning)
    teaches = None if teacher is None else guidance_of(teacher.conditioning)
    if said := input_mistake(recipe.guidance_range, starts, teaches, recipe.needs):
        raise InputError(said)
    init = StudentInit(
        origin,
        stage.network,
        shape,
        samples.num_classes,
        seed,
        teacher,
        stage.dropout,
        shares=bool(stage.lora),
        changes=None if stage.student is None else stage.student.config,
        guidance_range=recipe.guidance_range,
    )
    if data is not None and "data" in recipe.needs:
        _check_buckets(init, data)
    return init


def _check_buckets(init: StudentInit, data: DataSet) -> None:
    """InputError if a network of a train stage cannot be called with the samples of one of the data's buckets."""
    copied = init.source if init.network is None and init.source is not init.teacher else None
    halvings = len(init.network.channels) - 1 if isinstance(init.network, UNetSpec) else 0
    for bucket in (each for each in data.buckets or [] if len(each.items)):
        size = f"{bucket.shape[1]}x{bucket.shape[2]} (height x width)"
        remedy = "change data.buckets.step or data.buckets.max_aspect"
        try:
            shape = codec_of(data, init.codec).shape(bucket.shape)
        except InputError as error:
            raise InputError(f"data.buckets: images of {size} cannot be encoded: {error}") from error
        for each in (init.teacher, copied):
            if each is not None and each.network is not None and (why := obstacle(each.network, shape)):
                raise InputError(f"data.buckets: {each.description} takes no images of {size}: {why}; {remedy}")
        if any(side % (1 << halvings) for side in shape[1:]):
            raise InputError(
                f"data.buckets: network.channels halves the samples {halvings} times, but those of images of {size} "
                f"have the shape {list(shape)}; give fewer channels, or {remedy}"
            )


def calls_teacher(recipe: ResolvedRecipe, teacher: LoadedTeacher | None) -> bool:
    """Whether a recipe keeps the teacher that it is given, or its field, and so may call its network.

    Recipes that train on pairs need a teacher, but do not call it.
    """
    if teacher is None or teacher.network is None or "teacher" not in recipe.needs:
        return False
    given = replace(teacher, field=copy(teacher.field))
    found: list[weakref.ref[object]] = [weakref.ref(given), weakref.ref(given.field)]
    made = recipe.module.Recipe(recipe.config, given)
    del given
    kept = any(each() is not None for each in found)
    del made
    return kept


def _is_lora(network: Origin) -> bool:
    return network.network is not None and has_base(network.network)


def _without_values(teacher: LoadedTeacher) -> LoadedTeacher:
    """The teacher, if it is of a latent-space pipeline with its network on the meta device, so that the networks made
    from it take no memory. Only their shapes are needed here.
    """
    if teacher.network is None or not native.is_native(teacher.network):
        return teacher
    assert isinstance(teacher.field, EdmField | NetworkField)
    shapes: dict[int, object] = {
        id(each): torch.nn.Parameter(each.to("meta"), each.requires_grad) for each in teacher.network.parameters()
    }
    network = deepcopy(teacher.network, shapes).to("meta")
    return replace(teacher, network=network, field=replace(teacher.field, network=network))


def _origin(stage: TrainStage, teacher: LoadedTeacher | None, earlier: Mapping[str, Built]) -> Origin | None:
    """The network that a stage starts from; None if it is not known yet. teacher: the spec's."""
    name = stage.init or stage.teacher
    if name is None:
        return teacher
    return earlier[name].student if name in earlier else None


def _student(earlier: Mapping[str, Built], name: str) -> Origin:
    if name not in earlier:
        raise InputError(f"the networks of stage '{name}' are not known")
    return earlier[name].student


def untrained(student: torch.nn.Module, init: StudentInit) -> Origin:
    """An untrained student, as later stages would load it."""
    facts = (init.shape, init.num_classes, init.null_class, "", "a student")
    for kind, each in KINDS.items():
        if not STUDENTS[kind].is_field and isinstance(student, each):
            sampler = STUDENTS[kind].samplers[0]
            return LoadedStudent(student, sampler, {}, *facts, {}, init.conditioning, init.packaging, init.codec)
    assert isinstance(student, VelocityStudent)
    network = student.network.eval().requires_grad_(False)
    field = NetworkField(network, linear(), "velocity", TIME_SCALE)
    if isinstance(student.call, LinearCall):
        field = NetworkField(network, linear(), "velocity", 1.0, call=student.call)
    return LoadedTeacher(field, *facts, network, given=init.conditioning, codec=init.codec, packaging=init.packaging)
