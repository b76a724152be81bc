"""Validation of a spec as a DAG of stages: references, settings without effect, and so on.

No tensors are created and nothing is written.
"""

from collections.abc import Iterator
from pathlib import Path

from distill.core.errors import InputError
from distill.core.text import expanded, suggest
from distill.spec import (
    cacheuse,
    clusterspec,
    evalchecks,
    guidancespec,
    launchspec,
    pairspec,
    resolved,
    rolechecks,
    specfile,
    trainspec,
)
from distill.spec.guidancespec import WEAK, FieldSettings
from distill.spec.kinds import SAMPLERS, STUDENTS
from distill.spec.model import (
    OF_DATA,
    CacheStage,
    CheckpointTeacher,
    EvaluateStage,
    GaussianTeacher,
    MixtureTeacher,
    NetworkStage,
    PairsStage,
    RunSpec,
    Stage,
    TrainStage,
)
from distill.spec.resolved import Resolved, ResolvedRecipe


def check(spec: RunSpec, base: Path) -> Resolved:
    """Resolve and validate a spec.

    Raises one InputError, with a line per mistake, if the spec cannot work or has settings without effect. Checks that
    need the teacher or the data themselves are in `preflight.check`.

    base: folder of the user's own recipes.
    """
    found = resolved.resolve(spec, base)
    mistakes = list(_mistakes(found))
    if mistakes:
        raise InputError(specfile.join(f"spec '{spec.name}'", mistakes))
    return found


def _mistakes(found: Resolved) -> Iterator[str]:
    spec = found.spec
    if not spec.stages:
        yield "stages: empty; a run needs at least one stage"
    yield from teacher_mistakes(spec)
    yield from spec.data.mistakes()
    yield from launchspec.mistakes(spec)
    yield from _compiled(found)
    yield from clusterspec.mistakes(spec)
    used: set[str] = set()
    if "teacher" in spec.stages:
        yield "stages.teacher: the name 'teacher' is reserved for the teacher in tables; give the stage another name"
    for name, stage in spec.stages.items():
        where = f"stages.{name}"
        if isinstance(stage, CacheStage):
            used |= found.uses(name)
            yield from cacheuse.mistakes(found, name, stage)
            continue
        yield from _references(spec, name, stage)
        yield from _kinds(found, name)
        used |= found.uses(name)
        if isinstance(stage, TrainStage):
            if name in found.failed:
                yield found.failed[name]
                continue
            recipe = found.recipes[name]
            yield from _recipe(stage, recipe, where)
            yield from rolechecks.mistakes(found, stage, where)
            yield from _train(found, stage, recipe, where)
            settings = FieldSettings(recipe.guidance_scale, stage.guidance)
            yield from guidancespec.mistakes(settings, f"{where}.", "options.guidance_scale")
            yield from _guidance(found, stage, settings, where, "options.")
            starts, teaches = found.guidance_range(stage.starts_from), found.guidance_range(stage.teacher)
            if said := guidancespec.input_mistake(recipe.guidance_range, starts, teaches, recipe.needs):
                yield f"{where}: {said}"
        elif isinstance(stage, PairsStage):
            yield from _pairs(found, stage, where)
            yield from _guidance(found, stage, stage.field_settings, where)
        else:
            yield from _evaluate(found, stage, where)
            guided = next((each for each in (stage.guidance_scale, *stage.guidance_scales) if each != 1), None)
            yield from guidancespec.mistakes(stage.settings_at(guided), f"{where}.")
            yield from _guidance(found, stage, stage.settings_at(guided), where)
    trained = [stage.teacher for stage in spec.stages.values() if isinstance(stage, TrainStage) and stage.teacher]
    loaded = isinstance(spec.teacher, CheckpointTeacher) and "teacher" in used
    if spec.launch.divide_teacher and not loaded and not trained:
        yield "launch.divide_teacher: no stage has a teacher with weights, so it has no effect; remove it"
    if spec.teacher is not None and "teacher" not in used:
        yield "teacher: no stage uses it, so it has no effect; remove it"
    yield from spec.data.unused("data" in used, loaded)
    if "data" in used:
        yield from trainspec.buckets(found)


def _compiled(found: Resolved) -> Iterator[str]:
    """The mistakes in `compile`."""
    spec, trains = found.spec, [name for name, each in found.spec.stages.items() if isinstance(each, TrainStage)]
    if not spec.compile:
        return
    if spec.numerics == "exact":
        yield "compile: compiled networks round differently on other machines and versions; set numerics: fast for it"
    if not trains:
        yield "compile: applies to training, and no stage trains; remove it"
    if spec.launch.zero_stage == 3 or spec.launch.divide_teacher:
        option = "zero_stage: 3" if spec.launch.zero_stage == 3 else "divide_teacher"
        yield (
            f"compile: does not work with launch.{option}, which gathers the weights of each layer while it is called; "
            "compiled blocks call their layers together"
        )
    for name in trains:
        if name not in found.failed and "jvp" in found.recipes[name].needs:
            yield (
                f"compile: stages.{name} uses forward-mode derivatives, which torch.compile does not support; set "
                "derivative: central, or compile: false"
            )


def references(stage: Stage) -> list[tuple[str, str, str]]:
    """(field, name of the other stage, required kind of that stage) of each reference of a stage."""
    if isinstance(stage, CacheStage):
        return []
    found: list[tuple[str, str | None, str]] = [("teacher", stage.teacher, "train")]
    if isinstance(stage, TrainStage):
        found += [("init", stage.init, "train"), *(("pairs", pairs, "pairs") for pairs in stage.pair_shares)]
    if stage.guidance is not None:
        found.append((WEAK, stage.guidance.weak, "train"))
    if isinstance(stage, EvaluateStage):
        found += [(f"students.{student}", student, "train") for student in stage.students]
    return [(field, target, kind) for field, target, kind in found if target is not None]


def needed(spec: RunSpec, name: str) -> list[str]:
    """The stages that must be done before a stage: those that it refers to, and the cache stage."""
    cache = [] if spec.cache in (None, name) else [spec.cache]
    return [*cache, *(target for _, target, _ in references(spec.stages[name]))]


def _references(spec: RunSpec, name: str, stage: Stage) -> Iterator[str]:
    """The mistakes in references. Each must name an earlier stage of the right kind, so that there are no cycles."""
    order = list(spec.stages)
    earlier = order[: order.index(name)]
    for field, target, kind in references(stage):
        if target in earlier and spec.stages[target].kind == kind:
            continue
        fitting = [other for other in earlier if spec.stages[other].kind == kind]
        valid = suggest(target, fitting) if fitting else f"no {kind} stage comes before '{name}'"
        if target not in spec.stages:
            yield f"stages.{name}.{field}: there is no stage '{target}'; {valid}"
        elif target not in earlier:
            itself = "itself" if target == name else f"'{target}', which comes later"
            yield f"stages.{name}.{field}: refers to {itself}; a stage can refer only to earlier stages; {valid}"
        else:
            yield f"stages.{name}.{field}: '{target}' is a {spec.stages[target].kind} stage, not {kind}; {valid}"


def teacher_mistakes(spec: RunSpec) -> Iterator[str]:
    """The mistakes in the spec's teacher."""
    teacher = spec.teacher
    size: int | None = None
    if isinstance(teacher, GaussianTeacher):
        size = len(teacher.mean)
        if not teacher.mean or len(teacher.std) != size:
            yield f"teacher.std: {len(teacher.std)} values given for a mean of {size}; give one per coordinate"
    elif isinstance(teacher, MixtureTeacher):
        size = len(teacher.means[0]) if teacher.means else 0
        lengths = {len(row) for row in teacher.means}
        if not size or len(lengths) != 1:
            yield f"teacher.means: rows of {sorted(lengths)} coordinates given; all need the same number, at least 1"
        if teacher.weights is not None and len(teacher.weights) != len(teacher.means):
            yield f"teacher.weights: {len(teacher.weights)} given for {len(teacher.means)} components"
    elif isinstance(teacher, CheckpointTeacher):
        local = expanded(teacher.path)
        if not local.exists() and not teacher.is_of_hub:
            yield f"teacher.path: there is no folder {teacher.path}; give a checkpoint's folder or a hub id (org/name)"
    if size and spec.data.has_samples:
        has = "images" if spec.data.has_images else "latents" if spec.data.is_encoded else "points in the plane"
        yield (
            f"data: kind {spec.data.kind} has {has}, the {spec.teacher.kind if spec.teacher else ''} teacher makes "
            f"vectors of {size}; use data: {{kind: none}} or another teacher"
        )


def _recipe(stage: TrainStage, recipe: ResolvedRecipe, where: str) -> Iterator[str]:
    """The mistakes in what a recipe declares: an unknown kind of student, a sampler that does not fit, and so on."""
    if recipe.kind is None:
        kinds = ", ".join(STUDENTS)
        yield f"{where}: {stage.recipe} makes a student of unknown kind '{recipe.config.student}'; valid: {kinds}"
    elif recipe.sampler not in (valid_samplers := [s for s in recipe.kind.samplers if not SAMPLERS[s].is_fitted]):
        valid = ", ".join(valid_samplers)
        yield (
            f"{where}: {stage.recipe} sets the sampler {recipe.sampler}, which cannot sample a "
            f"{recipe.config.student} student; valid: {valid}"
        )
    if "pairs" in recipe.needs and "teacher" not in recipe.needs:
        yield f"{where}: {stage.recipe} needs pairs, which a teacher generates; add 'teacher' to its Config.needs"


def _kinds(found: Resolved, name: str) -> Iterator[str]:
    """The mistakes in kinds of students.

    A teacher must be a velocity field. A student can start only from a velocity field or a student of its own kind.
    """
    stage = found.spec.stages[name]
    assert not isinstance(stage, CacheStage)
    teacher = found.kind(stage.teacher)
    if teacher is not None and not teacher.is_field:
        yield (
            f"stages.{name}.teacher: the student of '{stage.teacher}' is {teacher.words}, but a teacher must be a "
            "velocity field; name a stage with a velocity student"
        )
    if not isinstance(stage, TrainStage) or name not in found.recipes:
        return
    own, origin = found.recipes[name], found.kind(stage.init)
    if origin is not None and not origin.is_field and own.kind != origin:
        yield (
            f"stages.{name}.init: the student of '{stage.init}' is {origin.words}, but {stage.recipe} makes one of "
            f"kind {own.config.student}; name a stage with a velocity student"
        )


def _guidance(
    found: Resolved, stage: NetworkStage, settings: FieldSettings, where: str, of_scale: str = ""
) -> Iterator[str]:
    """The mistakes in guidance with a student of this run: as the teacher, it must know the unconditional velocity.

    For the spec's teacher, this is checked when it is loaded. of_scale: where the stage has its guidance scale.
    """
    yield from _weak(found, stage, settings, where)
    teacher = found.spec.stages.get(stage.teacher or "")
    recipe = found.recipes.get(stage.teacher or "")
    if isinstance(teacher, TrainStage) and settings.epsilon_scale != 1:
        yield (
            f"{where}.epsilon_scale: {settings.epsilon_scale:g} given, but the student of '{stage.teacher}' is defined "
            "up to pure noise (t = 1), where the scaled velocity is infinite; remove it"
        )
    if not settings.needs_null or not isinstance(teacher, TrainStage) or recipe is None:
        return
    swept = isinstance(stage, EvaluateStage) and settings.guidance_scale in stage.guidance_scales
    field = f"{of_scale}{'guidance_scales' if swept else 'guidance_scale'}"
    given = f"{where}.{field}: {settings.guidance_scale:g} given, but"
    if not recipe.unconditional:
        yield (
            f"{given} the student of '{stage.teacher}' has no unconditional prediction, because it was trained only "
            "on its teacher's outputs; use 1, or a teacher trained on data"
        )
    elif teacher.network is not None and not found.spec.data.has_classes:
        yield (
            f"{given} the data has no classes, so the student of '{stage.teacher}' has no separate unconditional "
            "prediction; use 1, or labelled data"
        )


def _weak(found: Resolved, stage: NetworkStage, settings: FieldSettings, where: str) -> Iterator[str]:
    """The mistakes in the weak model of autoguidance."""
    weak, path, kind = settings.form.weak, settings.form.weak_path, found.kind(settings.form.weak)
    if weak is not None and weak == stage.teacher:
        yield f"{where}.{WEAK}: '{weak}' is the teacher itself, so guidance has no effect; name another stage"
    if kind is not None and not kind.is_field:
        yield (
            f"{where}.{WEAK}: the student of '{weak}' is {kind.words}, but a weak model must be a velocity field; name "
            "a stage with a velocity student"
        )
    if path is not None and not expanded(path).is_dir():
        yield f"{where}.{WEAK}_path: there is no folder {path}; give a checkpoint's folder"


def _train(found: Resolved, stage: TrainStage, own: ResolvedRecipe, where: str) -> Iterator[str]:
    spec, recipe, needs = found.spec, stage.recipe, own.needs
    if "jvp" in needs and spec.launch.zero_stage == 3:
        yield (
            f"{where}: {recipe} uses forward-mode derivatives (jvp), which do not work with launch.zero_stage: 3: "
            "gathering the weights of a layer while it is called has none; use 0, 1 or 2"
        )
    if "data" in needs and not spec.data.has_samples:
        vectors = "teacher" in needs and found.has_exact_teacher(stage)
        hint = (
            "the teacher makes vectors, for which there is no data; use reflow/reflow"
            if vectors
            else f"the spec has {'only prompts' if spec.data.has_prompts else 'none'}; e.g. data: {{kind: digits}}"
        )
        yield f"{where}: {recipe} needs data, but {hint}"
    if "pairs" in needs and not stage.pair_shares:
        known = [name for name, other in spec.stages.items() if isinstance(other, PairsStage)]
        yield f"{where}: {recipe} needs pairs; name a pairs stage in {where}.pairs ({', '.join(known) or 'none yet'})"
    if "pairs" not in needs and stage.pairs is not None:
        yield f"{where}.pairs: {recipe} needs no pairs, so this has no effect; remove it"
    if "pairs" in needs:
        yield from pairspec.of_training(spec, stage, needs, f"{where}.pairs")
    teacher = stage.teacher or ("the spec's" if spec.teacher is not None else None)
    if "teacher" in needs and teacher is None:
        yield f"{where}: {recipe} needs a teacher; give {where}.teacher (a train stage), or the spec's teacher"
    if "teacher" not in needs and stage.teacher is not None:
        yield f"{where}.teacher: {recipe} needs no teacher, so this has no effect; remove it"
    if stage.init is not None and stage.network is not None:
        yield f"{where}: init and network are both given, but training starts from only one of them; remove one"
    if stage.init is None and stage.network is None:
        if "teacher" not in needs and not found.copies_teacher(stage):
            yield (
                f"{where}: no initial weights; give network (new weights), init (an earlier train stage), or a "
                "checkpoint as the spec's teacher"
            )
        elif spec.teacher is not None and found.has_exact_teacher(stage):
            yield (
                f"{where}: the {spec.teacher.kind} teacher has no weights to start from; give network, e.g. "
                "network: {kind: mlp}"
            )
    if "weights" in needs and stage.network is not None:
        yield (
            f"{where}.network: {recipe} starts from trained weights, which a new network does not have; remove it, and "
            "give init (an earlier train stage)"
        )
    if stage.network is not None and "data" in needs and "teacher" not in needs and spec.data.has_captions:
        yield (
            f"{where}.network: a new network takes class labels, but no captions; remove the captions from data, or "
            "start from a network that takes prompts (init)"
        )
    if stage.network is not None:
        yield from trainspec.network(found, stage, stage.network, f"{where}.network")
    yield from trainspec.lengths(spec, stage, own.rows_together, where)


def _pairs(found: Resolved, stage: PairsStage, where: str) -> Iterator[str]:
    spec = found.spec
    if stage.teacher is None and spec.teacher is None:
        yield f"{where}: pairs need a teacher; give {where}.teacher (a train stage), or the spec's teacher"
    known = found.spec.has_exact_teacher or spec.data.has_samples
    if stage.paths in OF_DATA and not known:
        yield f"{where}.paths: {stage.paths} needs real data, but the spec has none; e.g. data: {{kind: digits}}"
    yield from pairspec.mistakes(stage, f"{where}.")


def _evaluate(found: Resolved, stage: EvaluateStage, where: str) -> Iterator[str]:
    """The mistakes that depend on the other stages, and those of the stage alone."""
    if stage.teacher is None and found.spec.teacher is None:
        yield f"{where}: an evaluation needs a teacher; give {where}.teacher (a train stage), or the spec's teacher"
    yield from evalchecks.mistakes(stage, f"{where}.")
    for network in stage.times:
        if (kind := found.kind(network)) is not None and not kind.is_field:
            here = f"{where}.times.{network}"
            yield f"{here}: its student is {kind.words}, for which step times cannot be chosen; remove it"
    for student in stage.fine_students:
        if (kind := found.kind(student)) is not None and not kind.is_field:
            yield f"{where}.fine_students: '{student}' is {kind.words}, which a solver cannot integrate; remove it"
