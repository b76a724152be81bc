"""Checks before anything is written: teacher, data and networks are loaded and built, to see whether they fit together.

The predictions of memory (`estimate`) and time (`forecast`) use what was loaded and built here.
"""

import weakref
from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distill import caches, teachers
from distill.core import file_checksums
from distill.core.errors import InputError
from distill.data import DataSet, load_data, load_prompts, overview, update_index
from distill.data.encoded import codec_of, sample_shape
from distill.data.overview import DataOverview
from distill.execution import caching, sources
from distill.flow.codecs import PIXELS
from distill.flow.conditioning import ConditionTable
from distill.flow.interpolants import linear
from distill.networks.sharing import has_base, is_shared
from distill.networks.velocity import TIME_SCALE, VelocityStudent
from distill.protocols import Adapter, Copy, Recipe
from distill.spec import cacheuse, pairspec, registry
from distill.spec.kinds import STUDENTS
from distill.spec.model import CacheStage, EvaluateStage, PairsStage, RunSpec, TrainStage, UNetSpec
from distill.spec.resolved import Resolved, ResolvedRecipe
from distill.students import adapting, native, sampling, smaller
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.loaded import KINDS, LoadedStudent
from distill.students.smaller import SmallerStudent
from distill.teachers import LoadedTeacher
from distill.teachers.codecs import LatentCodec
from distill.teachers.network_field import EdmField, LinearCall, NetworkField
from distill.teachers.of_students import weak_teacher
from distill.teachers.sample_sizes import obstacle
from distill.training import optimizers

CPU = torch.device("cpu")
Origin = LoadedTeacher | LoadedStudent  # what a later stage may start from; a velocity field may also teach it


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


@dataclass(frozen=True)
class Ready:
    """A spec that has passed all checks, with what they have loaded. Its networks are large: do not keep it."""

    resolved: Resolved
    teacher: LoadedTeacher | None
    """the teacher that the spec names"""
    built: Mapping[str, Built]
    """by train stage; stages whose networks are known only after earlier stages are left out"""
    data: DataOverview | None
    """what the spec's data is; None: there is none"""

    def student(self, stage: str) -> Origin:
        """The untrained student of a stage. InputError if its networks are not known yet."""
        if stage not in self.built:
            raise InputError(f"the networks of stage '{stage}' are not known")
        return self.built[stage].student


def check(resolved: Resolved, store: Path | None = None, *, keep_index: bool = False) -> Ready:
    """Load the teacher and the data of a spec, build the networks of its train stages, and check that they fit.

    InputError if they do not. Errors in a stage that starts from, or is taught by, the student of an earlier stage are
    not reported, because that student is not trained yet: the stage is left out of `Ready.built`. A stage that trains
    adapters is an exception.

    store: where an index of the data, and checksums of large files, may be kept. keep_index: write the index to the
    store before the checks that follow.
    """
    spec = resolved.spec
    if store is not None:
        file_checksums.read(store)
    if store is not None and keep_index:
        update_index(spec.data, store)
    # The images are not needed after the checks.
    data = load_data(spec.data, spec.seed, store, keep=False, indexed=keep_index)
    texts = load_prompts(spec.data, store, indexed=keep_index) if data is None else data.prompts
    prompts = len(texts) if texts is not None and cacheuse.may_store_prompts(spec) else None  # not encoded yet
    teacher = None if spec.teacher is None else teachers.load_teacher(spec.teacher, CPU, prompts=prompts)
    takes_prompts = teacher is not None and isinstance(teacher.given, ConditionTable)
    caching.check(resolved, data, texts, takes_prompts=takes_prompts)
    if spec.cache is not None and cacheuse.stores_latents(resolved):
        stage = spec.stages[spec.cache]
        assert isinstance(stage, CacheStage)
        caches.latents.check(stage, PIXELS if teacher is None else teacher.codec, f"stages.{spec.cache}.")
    for stage in spec.stages.values():
        if isinstance(stage, PairsStage | EvaluateStage) and stage.teacher is None and teacher is not None:
            _check_field(teacher, spec, stage, prompts)
        if isinstance(stage, EvaluateStage) and data is not None:
            from distill.evaluation import compatible

            compatible.refuse_few(data)
        if isinstance(stage, EvaluateStage) and (stage.metrics or stage.pictured):
            from distill.evaluation import judging
            from distill.evaluation.metrics import own

            if stage.teacher is None and teacher is not None:
                judging.prepare(stage, teacher, None if prompts is None else texts)
            else:
                for metric in stage.metrics:
                    own.load(metric)
    measured = any(isinstance(stage, EvaluateStage) for stage in spec.stages.values())
    encodes = data is not None and not data.encoded
    if teacher is not None and isinstance(teacher.codec, LatentCodec) and (measured or encodes):
        teacher.codec.check()
    if teacher is not None and data is not None:
        sources.check_shapes(teacher, data)
        sources.check_labels(spec, teacher, data)
    if teacher is not None and data is None and texts is not None:
        sources.check_prompts(teacher, spec.data.name, len(texts))
    built: dict[str, Built] = {}
    for name, recipe in resolved.recipes.items():
        stage = spec.stages[name]
        assert isinstance(stage, TrainStage)
        before = {each for each in (stage.teacher, stage.init) if each is not None}
        known = not before or (bool(stage.lora) and before <= built.keys())  # adapters start from what is known
        try:
            if stage.teacher is None and teacher is not None:
                teacher.guided(recipe.guidance_scale)
            if stage.student is not None and (origin := _origin(stage, teacher, built)) is not None:
                smaller.check(origin, stage.student.config)
        except InputError as error:
            raise InputError(f"stages.{name}: {error}") from error
        try:
            made, built[name] = _build(stage, recipe, teacher, data, built)
            if known:
                t_grids(spec, name, made, pairspec.times_of(spec, stage))
        except InputError as error:
            if known:
                raise InputError(f"stages.{name}: {error}") from error
    return Ready(resolved, teacher, built, overview.of(spec.data, data, store))


def _check_field(teacher: LoadedTeacher, spec: RunSpec, stage: PairsStage | EvaluateStage, prompts: int | None) -> None:
    """InputError if the teacher's field cannot be changed as a stage asks, e.g. if there is no unconditional call.

    prompts: see `load_teacher`.
    """
    settings = stage.field_settings
    if settings.form.weak is not None:  # a student that is not trained yet
        teacher.field_with(replace(settings, guidance_scale=1.0))
        return
    weak = weak_teacher(spec, stage, Path())
    teacher = teacher if weak is None else replace(teacher, weak=teachers.load_teacher(weak, CPU, prompts=prompts))
    teacher.field_with(settings)
    if isinstance(stage, EvaluateStage):
        for scale in stage.guidance_scales:
            teacher.field_with(stage.settings_at(scale))


def t_grids(spec: RunSpec, name: str, recipe: Recipe, times: list[float] | None) -> dict[int, list[float]]:
    """The step times of the student of stage `name`, by number of steps; empty if it has none of its own.

    InputError if the spec evaluates the student with a number of steps, or with times, that it will not support.

    times: those of the states of its pairs, if they are the same for all.
    """
    found = sampling.own_grids(recipe, times)
    for where, each in ((f"stages.{n}", s) for n, s in spec.stages.items() if isinstance(s, EvaluateStage)):
        sampling.refuse_steps(found, each.students.get(name, []), f"{where}.students.{name}")
        if name in each.times:
            sampling.refuse_times(found, f"{where}.times.{name}")
    return found


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


def _build(
    stage: TrainStage,
    recipe: ResolvedRecipe,
    own: LoadedTeacher | None,
    data: DataSet | None,
    earlier: Mapping[str, Built],
) -> tuple[Recipe, Built]:
    """Build the recipe and the networks of a train stage. own: the spec's teacher. InputError if they do not fit."""
    teacher = _student(earlier, stage.teacher) if stage.teacher is not None else own
    copied = stage.init is None and stage.network is None
    teacher = teacher if copied or "teacher" in recipe.needs else None
    if isinstance(teacher, LoadedStudent):
        raise InputError(f"{teacher.description} is not a teacher")
    if teacher is not None:
        teacher = _without_values(teacher_on_linear_path(teacher))
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
    changed = {name: [p for p in each.parameters() if not is_shared(p)] for name, each in trained.items()}
    sizes = {name: [p.numel() for p in each if p.requires_grad] for name, each in changed.items()}
    still = {name: [p.numel() for p in each if not p.requires_grad] for name, each in changed.items()}
    states = [optimizers.state_bytes(stage.optimizer, each) for each in trained.values()]
    moments = None if None in states else sum(each or 0 for each in states)
    shared = {p for each in trained.values() for p in each.parameters() if is_shared(p)}
    base = 0 if is_base else sum(p.numel() * p.element_size() for p in shared)
    copies = [role.of for role in roles.values() if isinstance(role, Copy)]
    made_as = roles["student"]
    student = made_as.module if isinstance(made_as, Adapter) else trained["student"]  # recipes' adapters will be merged
    exported = sum(p.numel() for p in student.parameters() if not is_shared(p))
    other = None if init.changes is None or origin is None else smaller.describe(origin, init.changes)
    return made, Built(_pretend(student, init), sizes, still, moments, exported, copies, kept, base, other)


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


def _pretend(student: torch.nn.Module, init: StudentInit) -> Origin:
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
