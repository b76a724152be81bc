"""A spec whose recipes are imported and configured, for checking, planning and execution. No tensors are created.

Recipes are resolved once, so that all later code uses the same modules and options.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from distill.core.errors import InputError
from distill.core.field_types import GuidanceRange
from distill.spec import registry, schema, specfile
from distill.spec.kinds import STUDENTS, StudentKind
from distill.spec.model import (
    OF_DATA,
    CacheStage,
    CheckpointTeacher,
    EvaluateStage,
    NetworkStage,
    RunSpec,
    Stage,
    TrainStage,
)
from distill.spec.registry import RecipeConfig


@dataclass(frozen=True)
class ResolvedRecipe:
    """The recipe of a train stage, configured with the options of the stage."""

    module: ModuleType
    config: RecipeConfig

    @property
    def needs(self) -> frozenset[str]:
        return self.config.needs

    @property
    def sampler(self) -> str:
        """Name of the student's sampler."""
        name: str = self.module.Recipe.sampler
        return name

    @property
    def kind(self) -> StudentKind | None:
        """Kind of the student; None if it is not a known kind."""
        return STUDENTS.get(self.config.student)

    @property
    def guidance_scale(self) -> float:
        """Classifier-free guidance scale with which the recipe calls its teacher; 1 = none. Of a range, the middle."""
        return registry.guidance_scale(self.config)

    @property
    def guidance_range(self) -> GuidanceRange | None:
        """The range of guidance scales that the student takes as an input, if it takes one."""
        return registry.guidance_range(self.config)

    @property
    def rows_together(self) -> int:
        """The size of a micro-batch must be a multiple of this."""
        return registry.rows_together(self.config)

    @property
    def unconditional(self) -> bool:
        """Whether the student learns the unconditional velocity."""
        return registry.unconditional(self.config)


@dataclass(frozen=True)
class Resolved:
    """A spec whose recipes are resolved."""

    spec: RunSpec
    """the spec; paths in the options of recipes are absolute"""
    base: Path
    """folder of the user's own recipes"""
    recipes: Mapping[str, ResolvedRecipe]
    """train stage -> its recipe"""
    failed: Mapping[str, str]
    """train stage whose recipe cannot be used -> why"""

    def guidance_range(self, stage: str | None) -> GuidanceRange | None:
        """The range of guidance scales that the student of a train stage takes as an input; None also if not known."""
        seen: set[str] = set()
        while stage is not None and stage in self.recipes and stage not in seen:
            if (found := self.recipes[stage].guidance_range) is not None:
                return found
            seen.add(stage)
            train = self.spec.stages[stage]
            stage = train.starts_from if isinstance(train, TrainStage) else None
        return None

    def kind(self, stage: str | None) -> StudentKind | None:
        """The kind of a train stage's student; None if there is no such stage or its kind is unknown."""
        recipe = self.recipes.get(stage or "")
        return None if recipe is None else recipe.kind

    def samplers(self, evaluation: EvaluateStage) -> dict[str, str]:
        """Train stage -> sampler, for the students that an evaluation measures."""
        return {name: self.recipes[name].sampler for name in evaluation.students if name in self.recipes}

    def needs(self, name: str) -> frozenset[str]:
        """The inputs of a stage: "teacher", "data", and other needs of its recipe."""
        stage = self.spec.stages[name]
        if isinstance(stage, TrainStage):
            own = self.recipes[name].needs
            return own | {"teacher"} if self.copies_teacher(stage) else own
        if isinstance(stage, CacheStage):
            return frozenset({"data"} if self.spec.teacher is None else {"teacher", "data"})
        of_data = isinstance(stage, EvaluateStage) or stage.paths in OF_DATA
        return frozenset({"teacher", "data"} if of_data else {"teacher"})

    def copies_teacher(self, stage: TrainStage) -> bool:
        """Whether training starts from the weights of the spec's teacher, whether or not the recipe calls it."""
        own = stage.teacher is None and stage.init is None and stage.network is None
        return own and isinstance(self.spec.teacher, CheckpointTeacher)

    def has_exact_teacher(self, stage: NetworkStage) -> bool:
        """Whether the teacher of a stage is the spec's, and known in closed form."""
        return stage.teacher is None and self.spec.has_exact_teacher

    def uses(self, name: str) -> frozenset[str]:
        """What a stage uses of the spec's own "teacher" and "data". With an unusable recipe it may use both."""
        needs = frozenset({"teacher", "data"}) if name in self.failed else self.needs(name)
        stage = self.spec.stages[name]
        return needs if isinstance(stage, CacheStage) or stage.teacher is None else needs - {"teacher"}

    def reads_images(self, name: str) -> bool:
        """Whether a stage reads data in files, which have an index, or prompts, which its teacher takes."""
        data = self.spec.data
        return data.place is not None and ("data" if data.has_samples else "teacher") in self.needs(name)


def resolve(spec: RunSpec, base: Path) -> Resolved:
    """Import and configure all recipes of a spec. A recipe that cannot be used is recorded in `failed`.

    base: the folder of the user's own recipes. Relative paths in options are searched for there first.
    """
    stages: dict[str, Stage] = dict(spec.stages)
    recipes: dict[str, ResolvedRecipe] = {}
    failed: dict[str, str] = {}
    for name, stage in spec.stages.items():
        if not isinstance(stage, TrainStage):
            continue
        where = f"stages.{name}"
        try:
            module = registry.load(stage.recipe, base)
            stages[name] = stage = stage.model_copy(update={"options": _located(stage.options, module, base)})
            config = registry.configure(stage.recipe, module, stage.options, f"{where}.options")
        except InputError as error:
            message = str(error)
            failed[name] = message if message.startswith(where) else f"{where}.recipe: {message}"
            continue
        recipes[name] = ResolvedRecipe(module, config)
    return Resolved(spec.model_copy(update={"stages": stages}), base, recipes, failed)


def of_run(spec: RunSpec, root: Path) -> Resolved:
    """Resolve the spec of an existing run, which was checked before. InputError if a recipe can no longer be used."""
    found = resolve(spec, root)
    for mistake in found.failed.values():
        raise InputError(mistake)
    return found


def resolve_recipe(stage: TrainStage, base: Path, where: str = "options") -> ResolvedRecipe:
    """The recipe of a stage that is not part of a spec yet. InputError if it cannot be used."""
    module = registry.load(stage.recipe, base)
    return ResolvedRecipe(module, registry.configure(stage.recipe, module, stage.options, where))


def _located(options: Mapping[str, object], module: ModuleType, base: Path) -> dict[str, object]:
    """The options with absolute paths; `specfile.load` does the same for the other fields of a spec."""
    fields = module.Config.model_fields
    return {
        key: specfile.absolute(value, [base, Path.cwd()])
        if isinstance(value, str) and key in fields and Path in schema.alternatives(fields[key].annotation)
        else value
        for key, value in options.items()
    }
