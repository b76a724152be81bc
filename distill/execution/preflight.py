"""Checks before anything is written: teacher, data and networks are loaded and built, to see whether they fit together.

The predictions of memory (`estimate`) and time (`forecast`) use what was loaded and built here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distill import caches, teachers
from distill.core import file_checksums
from distill.core.errors import InputError
from distill.data import load_data, load_prompts, overview, update_index
from distill.data.overview import DataOverview
from distill.execution import building, caching, sources
from distill.execution.building import Built, BuiltNetworks, Origin
from distill.flow.codecs import PIXELS
from distill.flow.conditioning import ConditionTable
from distill.protocols import Recipe
from distill.spec import cacheuse, pairspec
from distill.spec.model import CacheStage, EvaluateStage, NetworkStage, PairsStage, RunSpec, TrainStage
from distill.spec.resolved import Resolved
from distill.students import sampling
from distill.teachers import LoadedTeacher
from distill.teachers.codecs import LatentCodec
from distill.teachers.of_students import weak_teacher

CPU = torch.device("cpu")
Visit = Callable[[Resolved, str, BuiltNetworks], None]  # gets a spec, the name of a train stage, and its networks


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


def check(
    resolved: Resolved,
    store: Path | None = None,
    *,
    keep_index: bool = False,
    visit: Visit | None = None,
) -> Ready:
    """Load the teacher and the data of a spec, build the networks of its train stages, and check that they fit.

    InputError if they do not. Errors in a stage that starts from, or is taught by, the student of an earlier stage are
    not reported, because that student is not trained yet: the stage is left out of `Ready.built`. A stage that trains
    adapters is an exception.

    store: where an index of the data, and checksums of large files, may be kept. keep_index: write the index to the
    store before the checks that follow. visit: called with the networks of each train stage.
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

        def look(networks: BuiltNetworks, known: bool, name: str = name, stage: TrainStage = stage) -> None:
            if visit is not None:
                visit(resolved, name, networks)
            if known:
                t_grids(spec, name, networks.recipe, pairspec.times_of(spec, stage))

        try:
            weak = _weak_model(spec, stage, prompts)
            found = building.of_stage(stage, recipe, teacher, data, built, look, weak)
        except InputError as error:
            raise InputError(f"stages.{name}: {error}") from error
        if found is not None:
            built[name] = found
    return Ready(resolved, teacher, built, overview.of(spec.data, data, store))


def _check_field(teacher: LoadedTeacher, spec: RunSpec, stage: PairsStage | EvaluateStage, prompts: int | None) -> None:
    """InputError if the teacher's field cannot be changed as a stage asks, e.g. if there is no unconditional call.

    prompts: see `load_teacher`.
    """
    settings = stage.field_settings
    if settings.form.weak is not None:  # a student that is not trained yet
        teacher.field_with(replace(settings, guidance_scale=1.0))
        return
    if (weak := _weak_model(spec, stage, prompts)) is not None:
        teacher = replace(teacher, weak=weak)
    teacher.field_with(settings)
    if isinstance(stage, EvaluateStage):
        for scale in stage.guidance_scales:
            teacher.field_with(stage.settings_at(scale))


def _weak_model(spec: RunSpec, stage: NetworkStage, prompts: int | None) -> LoadedTeacher | None:
    """The weak model of a stage, if it is a checkpoint, and not a student that is not trained yet."""
    if stage.guidance is None or stage.guidance.weak is not None:
        return None
    weak = weak_teacher(spec, stage, Path())
    return None if weak is None else teachers.load_teacher(weak, CPU, prompts=prompts)


def t_grids(spec: RunSpec, name: str, recipe: Recipe, times: list[float] | None) -> dict[int, list[float]]:
    """The step times of the student of stage `name`, by number of steps; empty if it has none of its own.

    InputError if the spec evaluates the student with a number of steps, or with times, that it will not support.

    times: those of the states of its pairs, if they are the same for all.
    """
    found = sampling.own_grids(recipe, times)
    sampling.trained_steps(recipe, found)  # raises InputError if they are invalid
    for where, each in ((f"stages.{n}", s) for n, s in spec.stages.items() if isinstance(s, EvaluateStage)):
        sampling.refuse_steps(found, each.students.get(name, []), f"{where}.students.{name}")
        if name in each.times:
            sampling.refuse_times(found, f"{where}.times.{name}")
    return found
