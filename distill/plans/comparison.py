"""The spec of a comparison: several recipes with the same teacher, data and minutes of training. Creates no tensors.

    spec                 teach, pairs, anneal, slimflow, reflow, evaluate
    slimflow, meanflow   teach, pairs, anneal, slimflow, meanflow, evaluate

The stages that make the teacher and its pairs are unchanged, and all recipes share them. For each recipe there is a
chain: its stage and the stages that this one starts from or learns from, including their own pairs. A recipe without a
stage in the spec gets one stage with default options; its other settings are those of the first distilling stage. The
lengths of a chain are scaled together, so that its training takes the given minutes. The time per image is measured
before, in a rehearsal of a few steps. The result is an ordinary spec.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distill.core.errors import InputError
from distill.core.text import suggest
from distill.reports.comparison_table import short
from distill.spec import checks, evalspec, registry
from distill.spec.guidancespec import WEAK
from distill.spec.model import WITH_STATES, CacheStage, EvaluateStage, PairsStage, RunSpec, Stage, TrainStage
from distill.spec.resolved import Resolved, resolve_recipe


@dataclass(frozen=True)
class Chain:
    """The stages that make one student."""

    name: str
    """name of the last stage, which makes the student"""
    recipe: str
    stages: dict[str, Stage]
    """the stages in order, without the shared ones; the last one makes the student"""

    @property
    def trained(self) -> dict[str, TrainStage]:
        return {name: stage for name, stage in self.stages.items() if isinstance(stage, TrainStage)}

    @property
    def pairs(self) -> list[str]:
        """Names of the pairs stages that the chain trains on."""
        return list(dict.fromkeys(name for stage in self.trained.values() for name in stage.pair_shares))


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison with the original lengths of the spec."""

    given: RunSpec
    shared: dict[str, Stage]
    chains: list[Chain]
    evaluation_name: str
    evaluation: EvaluateStage

    def spec(self, changed: Mapping[str, Stage] | None = None) -> RunSpec:
        """The spec of the comparison. changed: stages to replace.

        Students without given numbers of steps are not evaluated in it yet.
        """
        stages = dict(self.shared)
        for chain in self.chains:
            stages |= chain.stages
        students = {c.name: steps for c in self.chains if (steps := self.evaluation.students.get(c.name))}
        stages[self.evaluation_name] = evalspec.measuring(self.evaluation, students)
        return self.given.model_copy(update={"stages": {**stages, **(changed or {})}})


def plan(resolved: Resolved, recipes: Sequence[str] | None) -> ComparisonPlan:
    """The comparison of these recipes; None: all distillation recipes of the spec. InputError if the spec does not fit.

    The spec of the result is not validated yet.
    """
    spec = resolved.spec
    name, evaluation = _evaluation(spec)
    teachers = _teachers(resolved, evaluation)
    distilled = {n: s for n, s in spec.stages.items() if isinstance(s, TrainStage) and n not in teachers}
    chosen = list(dict.fromkeys(stage.recipe for stage in distilled.values()))
    if recipes is not None:
        chosen = _resolve(recipes, [s.recipe for s in spec.stages.values() if isinstance(s, TrainStage)])
    elif not chosen:
        raise InputError(
            f"spec '{spec.name}' has no distillation recipe; name some with --recipes, like reflow,one_step"
        )
    ends = {recipe: _ends(spec, distilled, recipe) for recipe in chosen}
    common = teachers | _shared_pairs(spec, teachers)
    parts = {end: _line(spec, end) - common for each in ends.values() for end in each}
    chains = []
    for recipe in chosen:
        chains += [_own_chain(spec, end, parts) for end in ends[recipe]]
        if not ends[recipe]:
            chains.append(_derived_chain(resolved, recipe, teachers, distilled))
    _refuse_one_name(chains)
    needing = [evaluation, *(stage for chain in chains for stage in chain.stages.values())]
    targets = {target for stage in needing for _, target, _ in checks.references(stage) if target in common}
    used = _lines(spec, targets) | ({spec.cache} if spec.cache else set())
    shared = {n: s for n, s in spec.stages.items() if n in used}
    return ComparisonPlan(spec, shared, chains, name, evaluation)


def _refuse_one_name(chains: Sequence[Chain]) -> None:
    """Raise InputError if two chains have a stage of the same name.

    `_new` already compares new names with those of the spec.
    """
    recipes: dict[str, list[str]] = {}
    for chain in chains:
        for name in chain.stages:
            recipes.setdefault(name, []).append(chain.recipe)
    for name, each in recipes.items():
        if len(each) > 1:
            raise InputError(
                f"--recipes: {' and '.join(each)} would both get a stage '{name}'; add a stage for one of them to the "
                "spec, with another name"
            )


def _evaluation(spec: RunSpec) -> tuple[str, EvaluateStage]:
    found = [(name, stage) for name, stage in spec.stages.items() if isinstance(stage, EvaluateStage)]
    if not found:
        raise InputError(
            f"spec '{spec.name}' has no evaluate stage, which a comparison needs; add one, like "
            "evaluate: {kind: evaluate, teacher: teach, students: {}}"
        )
    return found[-1]


def _teachers(resolved: Resolved, evaluation: EvaluateStage) -> set[str]:
    """The stages that make the teacher of the evaluation, or any other teacher that is trained on data alone."""
    spec, recipes = resolved.spec, resolved.recipes
    named = {
        target for s in spec.stages.values() for field, target, _ in checks.references(s) if field in ("teacher", WEAK)
    }
    alone = [name for name in named if name in recipes and not recipes[name].needs & {"teacher", "pairs"}]
    return _lines(spec, [*([evaluation.teacher] if evaluation.teacher else []), *alone])


def _line(spec: RunSpec, name: str) -> set[str]:
    """A stage and all stages that it depends on."""
    found = {name}
    for _, target, _ in checks.references(spec.stages[name]):
        found |= _line(spec, target)
    return found


def _lines(spec: RunSpec, names: Iterable[str]) -> set[str]:
    return set().union(*(_line(spec, name) for name in names))


def _shared_pairs(spec: RunSpec, teachers: set[str]) -> set[str]:
    """The pairs stages of the teachers, which all chains share."""
    pairs = {name: stage for name, stage in spec.stages.items() if isinstance(stage, PairsStage)}
    return {name for name, stage in pairs.items() if stage.teacher is None or stage.teacher in teachers}


def _resolve(given: Sequence[str], of_spec: Sequence[str]) -> list[str]:
    """Full names of recipes, which may be given without their folder. InputError if one is unknown or ambiguous."""
    known = dict.fromkeys([*registry.names(), *of_spec])
    times = Counter(short(name) for name in known)
    found = []
    for each in given:
        fitting = [name for name in known if each in (name, short(name))]
        fitting = [each] if each in known else fitting
        if len(fitting) > 1:
            raise InputError(f"--recipes: '{each}' matches {' and '.join(fitting)}; give the full name")
        if not fitting:
            valid = [short(name) if times[short(name)] == 1 else name for name in known]
            raise InputError(f"--recipes: there is no recipe '{each}'; {suggest(each, valid)}")
        if fitting[0] in found:
            raise InputError(f"--recipes names {fitting[0]} twice; name it once")
        found += fitting
    return found


def _ends(spec: RunSpec, distilled: Mapping[str, TrainStage], recipe: str) -> list[str]:
    """The stages of a recipe whose students are compared: those that no other stage of the same recipe depends on."""
    own = [name for name, stage in distilled.items() if stage.recipe == recipe]
    return [name for name in own if not any(name in _line(spec, other) - {other} for other in own)]


def _own_chain(spec: RunSpec, end: str, parts: Mapping[str, set[str]]) -> Chain:
    """The chain that ends in stage `end`. A stage that belongs to several chains is copied for each of them.

    parts: last stage of each chain -> the stages of the chain, without the shared ones.
    """
    found = Counter(name for each in parts.values() for name in each)
    names = {n: n if n == end or found[n] == 1 else _new(spec, f"{end}-{n}") for n in spec.stages if n in parts[end]}
    stages = {new: _renamed(spec.stages[old], names) for old, new in names.items()}
    last = spec.stages[end]
    assert isinstance(last, TrainStage)
    return Chain(end, last.recipe, stages)


def _new(spec: RunSpec, name: str) -> str:
    """`name` for a new stage. InputError if the spec already has a stage of that name."""
    if name in spec.stages:
        raise InputError(f"stages.{name}: the comparison also creates a stage with this name; rename this one")
    return name


def _renamed(stage: Stage, names: Mapping[str, str]) -> Stage:
    """A copy of a stage that refers to other stages by their new names."""
    if isinstance(stage, CacheStage):
        return stage
    changed: dict[str, object] = {"teacher": names.get(stage.teacher or "", stage.teacher)}
    if isinstance(stage, TrainStage):
        changed["init"] = names.get(stage.init or "", stage.init)
        if isinstance(stage.pairs, str):
            changed["pairs"] = names.get(stage.pairs, stage.pairs)
        elif stage.pairs is not None:
            changed["pairs"] = {names.get(name, name): share for name, share in stage.pairs.items()}
    if stage.guidance is not None:
        weak = names.get(stage.guidance.weak or "", stage.guidance.weak)
        changed["guidance"] = stage.guidance.model_copy(update={"weak": weak})
    return stage.model_copy(update=changed)


def _derived_chain(resolved: Resolved, recipe: str, teachers: set[str], distilled: Mapping[str, TrainStage]) -> Chain:
    """The chain of a recipe without a stage in the spec: one stage, based on the first distilling stage."""
    spec = resolved.spec
    made = [n for n in teachers if isinstance(s := spec.stages[n], TrainStage) and s.recipe == recipe]
    if made:
        raise InputError(f"--recipes: {recipe} trains the teacher here ('{made[0]}'); name recipes that distil it")
    name, first = _new(spec, short(recipe)), next(iter(distilled.values()), None)
    if first is None:
        raise InputError(
            f"--recipes: {recipe} has no stage in spec '{spec.name}', and there is no other distillation stage whose "
            "length, batch size and optimizer it could use; add a stage for it"
        )
    stage = TrainStage(
        kind="train",
        recipe=recipe,
        teacher=first.teacher,
        network=first.network if resolved.has_exact_teacher(first) else None,
        images=first.images,
        batch_size=first.batch_size,
        optimizer=first.optimizer,
        ema_half_lives=first.ema_half_lives,
        ema_lengths=first.ema_lengths,
        export=first.export,
        precision=first.precision,
        checkpoint=first.checkpoint,
    )
    needs = resolve_recipe(stage, resolved.base, f"--recipes: {recipe}").needs
    if not needs & {"teacher", "pairs"}:
        raise InputError(
            f"--recipes: {recipe} uses no teacher with its default options; add a stage with this recipe to the spec "
            "that uses the teacher, or starts from it (init)"
        )
    if "pairs" in needs:
        stage = stage.model_copy(update={"pairs": _pairs_for(spec, recipe, needs, first)})
    return Chain(name, recipe, {name: stage})


def _pairs_for(spec: RunSpec, recipe: str, needs: frozenset[str], first: TrainStage) -> str | dict[str, float] | None:
    """The pairs for a derived stage: those of the first distilling stage if they fit, else others of its teacher."""

    def fit(stage: Stage) -> bool:
        if not isinstance(stage, PairsStage):
            return False
        return stage.paths in WITH_STATES if "states" in needs else stage.paths != "segments"

    if first.pairs is not None and all(fit(spec.stages[name]) for name in first.pair_shares):
        return first.pairs
    solved = {name: stage for name, stage in spec.stages.items() if isinstance(stage, PairsStage) and fit(stage)}
    fitting = [name for name, stage in solved.items() if stage.teacher == first.teacher]
    if fitting:
        return fitting[0]
    what, how = (
        ("pairs with states", "paths: trajectories and times") if "states" in needs else ("pairs", "kind: pairs")
    )
    teacher = f"'{first.teacher}'" if first.teacher else "its teacher"
    raise InputError(
        f"--recipes: {recipe} needs {what} of {teacher}, but spec '{spec.name}' has none; add a pairs stage with {how}"
    )
