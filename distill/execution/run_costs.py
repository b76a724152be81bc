"""Counts what the stages of a run cost, on whatever machine, with the spec's own networks or those of a known model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
    UnsupportedFakeTensorException,
)

from distill.execution import building
from distill.execution.building import Built, BuiltNetworks
from distill.execution.layouts import TrainingJob
from distill.execution.rehearsal import TrainingCosts, forward_operations, rehearse
from distill.plans import planning
from distill.plans.device_kinds import Precision
from distill.plans.facts import ModelFacts
from distill.spec.model import EvaluateStage, PairsStage, TrainStage
from distill.spec.resolved import Resolved, ResolvedRecipe
from distill.teachers import LoadedTeacher, of_facts
from distill.teachers.quiet import quiet

# What torch raises where a tensor without values cannot stand for one that has some.
UNCOUNTED = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
    UnsupportedFakeTensorException,
)


@dataclass(frozen=True)
class RunCosts:
    """What the stages of a run cost."""

    trainings: dict[str, TrainingJob] = field(default_factory=dict)
    sampling: dict[str, float] = field(default_factory=dict)
    """stages that make pairs or evaluate -> floating-point operations of all their network calls"""


@dataclass(frozen=True)
class RunCounter:
    """Counts what the stages of a run cost.

    recomputed: see `rehearse`. say: called with a line before each stage, which takes seconds to minutes.
    """

    say: Callable[[str], object]
    recomputed: Sequence[bool] = (False, True)
    found: RunCosts = field(default_factory=RunCosts)
    _known: dict[str, TrainingCosts] = field(default_factory=dict)
    """those that are known, by `_key`: stages of a chain often differ only in where they start"""

    def __call__(self, resolved: Resolved, name: str, networks: BuiltNetworks) -> None:
        """Count a train stage. `preflight.check` calls this with its networks.

        A stage that needs the values of tensors is left out, and that is said.
        """
        stage = resolved.spec.stages[name]
        assert isinstance(stage, TrainStage)
        recipe = resolved.recipes[name]
        states = _states(resolved, stage) if "states" in recipe.needs else None
        key = _key(stage, recipe, networks, states)
        try:
            if key not in self._known:
                self.say(f"counting what an update of stage '{name}' computes and keeps in memory")
                self._known[key] = rehearse(networks, stage, recipe.needs, states, self.recomputed)
        except UNCOUNTED as error:
            reason = type(error).__name__
            self.say(
                f"warning: stage '{name}' cannot be counted: its recipe reads values of tensors, or takes forward-mode "
                f"derivatives (derivative: jvp) of layers that do not support it without values ({reason})"
            )
            return
        precision = _precision(resolved, stage.precision)
        self.found.trainings[name] = TrainingJob(self._known[key], stage.batch_size, stage.images, precision)

    def of_model(self, resolved: Resolved, model: ModelFacts) -> RunCosts:
        """The costs of all stages if this model is the teacher, without its weights and without data.

        InputError if the recipes cannot use it, or if it makes no samples of the size that the spec sets.
        """
        with quiet():
            teacher = of_facts.teacher_of(model, resolved.spec.teacher)
        built: dict[str, Built] = {}
        for name, recipe in resolved.recipes.items():
            stage = resolved.spec.stages[name]
            assert isinstance(stage, TrainStage)
            networks = building.build(stage, recipe, teacher, None, built)
            self(resolved, name, networks)
            built[name] = building.described(networks, stage)
        return self.with_sampling(resolved, teacher)

    def with_sampling(self, resolved: Resolved, teacher: LoadedTeacher | None) -> RunCosts:
        """All costs, with those of pairs and evaluations: each of their calls is taken to cost as the teacher's."""
        stages = resolved.spec.stages
        asked = {name: each for name, each in stages.items() if isinstance(each, PairsStage | EvaluateStage)}
        if teacher is None or teacher.network is None or not asked:
            return self.found
        planned = {step.name: step for step in planning.steps(resolved)}
        operations = forward_operations(teacher)
        for name in asked:
            self.found.sampling[name] = float(operations * (planned[name].network_calls or 0))
        return self.found


def _key(stage: TrainStage, recipe: ResolvedRecipe, networks: BuiltNetworks, states: int | None) -> str:
    """Text that is equal for stages with equal costs."""
    asked = [stage.recipe, recipe.config, stage.precision, stage.lora, stage.optimizer, stage.averages, states]
    modules = {**networks.trained, **networks.frozen}
    if networks.teacher is not None and networks.teacher.network is not None:
        modules["teacher"] = networks.teacher.network
    shapes = {
        name: [str(module), *((tuple(p.shape), p.dtype, p.requires_grad) for p in module.parameters())]
        for name, module in modules.items()
    }
    return repr([asked, shapes, networks.init.shape, networks.base])


def _states(resolved: Resolved, stage: TrainStage) -> int:
    """The number of states of each path of the pairs of a stage."""
    pairs = [resolved.spec.stages[each] for each in stage.pair_shares]
    return next(each.num_states for each in pairs if isinstance(each, PairsStage))


def _precision(resolved: Resolved, asked: str) -> Precision:
    if asked == "bf16":
        return "bf16"
    return "tf32" if resolved.spec.numerics == "fast" else "fp32"
