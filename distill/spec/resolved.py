"""A spec with its recipes found and configured: once, for all who check, plan or compute. No tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from distill.core.errors import InputError
from distill.spec import registry, schema, specfile
from distill.spec.kinds import STUDENTS, StudentKind
from distill.spec.model import (
    OF_DATA,
    EvaluateStage,
    HfData,
    ImagesData,
    RunSpec,
    Stage,
    TrainStage,
)
from distill.spec.registry import RecipeConfig


@dataclass(frozen=True)
class ResolvedRecipe:
    """The recipe of a train stage with the options of that stage."""

    module: ModuleType
    config: RecipeConfig

    @property
    def needs(self) -> frozenset[str]:
        return self.config.needs

    @property
    def sampler(self) -> str:
        """Of its student."""
        name: str = self.module.Recipe.sampler
        return name

    @property
    def kind(self) -> StudentKind | None:
        """Of its student; None: there is no such kind."""
        return STUDENTS.get(self.config.student)

    @property
    def guidance_scale(self) -> float:
        """The classifier-free guidance that it asks of its teacher."""
        return registry.guidance_scale(self.config)

    @property
    def rows_together(self) -> int:
        """The samples that a micro-batch must hold, or a multiple of them."""
        return registry.rows_together(self.config)

    @property
    def unconditional(self) -> bool:
        """Whether its student learns the unconditional velocity."""
        return registry.unconditional(self.config)


@dataclass(frozen=True)
class Resolved:
    """A spec whose recipes are known."""

    spec: RunSpec
    """paths among the options of recipes are absolute"""
    base: Path
    """the folder of own recipes"""
    recipes: Mapping[str, ResolvedRecipe]
    """by train stage"""
    failed: Mapping[str, str]
    """train stages whose recipe cannot be used, and why"""

    def kind(self, stage: str | None) -> StudentKind | None:
        """The kind of a train stage's student; None if there is none or it is unknown."""
        recipe = self.recipes.get(stage or "")
        return None if recipe is None else recipe.kind

    def samplers(self, evaluation: EvaluateStage) -> dict[str, str]:
        """Of the students that an evaluation measures."""
        return {name: self.recipes[name].sampler for name in evaluation.students if name in self.recipes}

    def needs(self, name: str) -> frozenset[str]:
        """What a stage computes from: "teacher", "data", and what else its recipe needs."""
        stage = self.spec.stages[name]
        if isinstance(stage, TrainStage):
            return self.recipes[name].needs
        of_data = isinstance(stage, EvaluateStage) or stage.paths in OF_DATA
        return frozenset({"teacher", "data"} if of_data else {"teacher"})

    def reads_images(self, name: str) -> bool:
        """Whether a stage computes from images that have an index."""
        return isinstance(self.spec.data, ImagesData | HfData) and "data" in self.needs(name)


def resolve(spec: RunSpec, base: Path) -> Resolved:
    """The spec with every recipe imported and configured. One that cannot be used is noted in `failed`.

    base: the folder that own recipes and relative paths in their options are looked up in.
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
    """The spec of a run, which was checked when the run was made; InputError if a recipe can no longer be used."""
    found = resolve(spec, root)
    for mistake in found.failed.values():
        raise InputError(mistake)
    return found


def resolve_recipe(stage: TrainStage, base: Path, where: str = "options") -> ResolvedRecipe:
    """That of a stage which is no part of a spec yet."""
    module = registry.load(stage.recipe, base)
    return ResolvedRecipe(module, registry.configure(stage.recipe, module, stage.options, where))


def _located(options: Mapping[str, object], module: ModuleType, base: Path) -> dict[str, object]:
    """Options with absolute paths, as `specfile.load` makes those of all other fields."""
    fields = module.Config.model_fields
    return {
        key: specfile.absolute(value, [base, Path.cwd()])
        if isinstance(value, str) and key in fields and Path in schema.alternatives(fields[key].annotation)
        else value
        for key, value in options.items()
    }
