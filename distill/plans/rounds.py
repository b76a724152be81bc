"""Rounds of reflow (Liu et al. 2022, arXiv 2209.03003): expands a spec of one round to several. Creates no tensors.

    one round             teach, pairs, reflow, one_step, evaluate
    two, and distilled    teach, pairs-1, reflow-1, evaluate-1, pairs-2, reflow-2, evaluate-2, pairs-distill, one_step,
                          evaluate

The flow of a round is the teacher of the next round: its ODE generates the pairs, and the next flow starts from its
weights. The last flow generates new pairs for the distillation. The evaluation of a round compares its flow with the
flow before, from the same noise. The last evaluation compares all flows with the first teacher. The result is an
ordinary spec.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distill.core.errors import InputError
from distill.core.text import suggest
from distill.spec import evalspec, overrides, specfile
from distill.spec.kinds import AUTO, FITTED, inverting_solvers, is_reference
from distill.spec.model import EvaluateStage, PairsStage, RunSpec, Stage, TrainStage
from distill.spec.overrides import Override
from distill.spec.resolved import Resolved
from distill.spec.samplingspec import FINE_STEPS

DISTILLATION, EVALUATION = "reflow/one_step", "evaluate"
DATA_WEIGHT = "data_weight"  # option of a recipe: weight of a flow-matching term on real data
FEW_STEPS = [1, 2, 4]
FITS = (
    "reflow needs a spec with one pairs stage, one train stage on its pairs whose velocity student can be the next "
    "teacher (reflow/reflow), and then at most one one-step distillation and one evaluation; for an example: "
    "`distill init digits`"
)


@dataclass(frozen=True)
class RoundsPlan:
    """The number of rounds, and the options that keep the flows close to the data."""

    rounds: int = 1
    distill: bool = False
    forward: float | None = None
    """fraction of each batch that is real data, paired with the noise that the round's teacher maps it to"""
    data_weight: float | None = None
    """weight of a flow-matching term on real data that is added to the loss of each round"""


@dataclass(frozen=True)
class Template:
    """The stages of a spec of one round, by their role."""

    before: dict[str, Stage]
    pairs_name: str
    pairs: PairsStage
    flow_name: str
    flow: TrainStage
    distillation: dict[str, TrainStage]
    """at most one stage"""
    evaluation_name: str
    evaluation: EvaluateStage


def expand(resolved: Resolved, plan: RoundsPlan) -> RunSpec:
    """The spec of all rounds, from a spec of one round. InputError if that spec or the plan does not fit."""
    spec, template = resolved.spec, _template(resolved)
    _refuse(resolved, template, plan)
    flows = [f"{template.flow_name}-{number}" for number in range(1, plan.rounds + 1)]
    stages = list(template.before.items())
    for number, teacher in enumerate([template.flow.teacher, *flows[:-1]], start=1):
        stages += _round(template, number, teacher, plan)
    if plan.distill:
        stages += _distillation(template, resolved, flows[-1])
    if not _one_evaluation(template, plan):
        stages.append((template.evaluation_name, _last_evaluation(template, flows, plan)))
    names = [name for name, _ in stages]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"stages.{twice[0]}: the rounds also create a stage with this name; rename this one")
    return spec.model_copy(update={"stages": dict(stages)})


def split(changes: Sequence[str], stages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split overrides into (those for a spec with these stages, those for stages that only its rounds have)."""
    late = [text for text in changes if (name := _stage_of(specfile.change_from(text))) and name not in stages]
    return [text for text in changes if text not in late], late


def changed(spec: RunSpec, changes: Sequence[str], stages: Sequence[str], source: str) -> RunSpec:
    """The spec of the rounds with overrides applied. InputError for an unknown stage.

    stages: names of the stages of the original spec, for suggestions. source: name of the file in messages.
    """
    found = [specfile.change_from(text) for text in changes]
    for change in found:
        name = _stage_of(change)
        if name is not None and name not in spec.stages:
            valid = suggest(name, dict.fromkeys([*stages, *spec.stages]))
            raise InputError(f"{change.text}: neither the spec nor its rounds have a stage '{name}'; {valid}")
    return specfile.validate(overrides.apply(spec.model_dump(mode="json"), found), source)


def _stage_of(change: Override) -> str | None:
    return change.path[1] if change.path[0] == "stages" and len(change.path) > 1 else None


def _template(resolved: Resolved) -> Template:
    spec = resolved.spec
    pairs = [name for name, stage in spec.stages.items() if isinstance(stage, PairsStage)]
    if len(pairs) != 1:
        raise _unfit(spec, _named("pairs stage", pairs))
    solved = spec.stages[pairs[0]]
    assert isinstance(solved, PairsStage)
    order = list(spec.stages)
    after = order[order.index(pairs[0]) + 1 :]
    trained = {n: s for n in after if isinstance(s := spec.stages[n], TrainStage)}
    distillation = {
        n: s
        for n, s in trained.items()
        if s.init in trained or s.teacher in trained or (s.recipe == DISTILLATION and s.pair_shares)
    }
    flows = {n: s for n, s in trained.items() if n not in distillation and s.pair_shares}
    if len(flows) != 1:
        raise _unfit(spec, _named(f"train stage for the next teacher on the pairs of '{pairs[0]}'", list(flows)))
    if len(distillation) > 1:
        raise _unfit(spec, _named("distillation", list(distillation)))
    ((name, flow),) = flows.items()
    recipe = resolved.recipes[name]
    if recipe.kind is None or not recipe.kind.is_field or "states" in recipe.needs:
        raise _unfit(spec, f"trains stage '{name}' with {flow.recipe}, whose student cannot be the next teacher")
    evaluations = [n for n in after if isinstance(spec.stages[n], EvaluateStage)]
    others = [n for n in after if n not in {name, *distillation, *evaluations[:1]}]
    if others:
        raise _unfit(spec, f"has other stages after its pairs: {', '.join(others)}")
    measured = spec.stages[evaluations[0]] if evaluations else _default_evaluation(solved, flow)
    assert isinstance(measured, EvaluateStage)
    return Template(
        before={n: spec.stages[n] for n in order[: order.index(pairs[0])]},
        pairs_name=pairs[0],
        pairs=solved,
        flow_name=name,
        flow=flow,
        distillation=distillation,
        evaluation_name=evaluations[0] if evaluations else EVALUATION,
        evaluation=measured,
    )


def _unfit(spec: RunSpec, what: str) -> InputError:
    return InputError(f"spec '{spec.name}' {what}; {FITS}")


def _named(what: str, names: Sequence[str]) -> str:
    return f"has more than one {what} ({', '.join(names)})" if names else f"has no {what}"


def _default_evaluation(pairs: PairsStage, flow: TrainStage) -> EvaluateStage:
    """The evaluation for a spec without one: its fine solver is the solver of the pairs, if that is possible."""
    return EvaluateStage(
        kind="evaluate",
        teacher=flow.teacher,
        fine_solver=pairs.solver if is_reference(pairs.solver) else "heun",
        fine_steps=pairs.steps if is_reference(pairs.solver) else FINE_STEPS,
        students={},
        guidance_scale=pairs.guidance_scale,
        guidance=pairs.guidance,
        epsilon_scale=pairs.epsilon_scale,
    )


def _refuse(resolved: Resolved, template: Template, plan: RoundsPlan) -> None:
    spec = resolved.spec
    if plan.rounds < 1:
        raise InputError(f"--rounds {plan.rounds}: must be at least 1")
    if plan.distill and not template.distillation:
        raise InputError(
            f"--distill: spec '{spec.name}' has no distillation stage; add a train stage with {DISTILLATION} on the "
            f"pairs of '{template.pairs_name}', or remove --distill"
        )
    inexact = not resolved.spec.has_exact_teacher  # an exact teacher can draw real samples itself
    lacking = {"--forward": plan.forward is not None and inexact, "--data-weight": plan.data_weight is not None}
    for option in [name for name, is_lacking in lacking.items() if is_lacking and not spec.data.has_samples]:
        raise InputError(
            f"{option} needs real data, but spec '{spec.name}' has none; add data, e.g. data={{kind: digits}}, "
            f"or remove {option}"
        )
    if plan.forward is not None and not 0 < plan.forward < 1:
        raise InputError(f"--forward {plan.forward:g}: must be a fraction between 0 and 1, like 0.2")
    if plan.forward is not None and template.pairs.paths == "forward":
        raise InputError(f"--forward: '{template.pairs_name}' already generates forward pairs; remove --forward")
    if plan.data_weight is not None and not 0 < plan.data_weight < math.inf:
        raise InputError(f"--data-weight {plan.data_weight:g}: must be greater than 0, like 0.1")
    options = resolved.recipes[template.flow_name].module.Config.model_fields
    if plan.data_weight is not None and DATA_WEIGHT not in options:
        recipe = template.flow.recipe
        raise InputError(f"--data-weight: {recipe} has no option {DATA_WEIGHT}; remove it, or use reflow/reflow")


def _round(template: Template, number: int, teacher: str | None, plan: RoundsPlan) -> list[tuple[str, Stage]]:
    """(name, stage) of the stages of a round. teacher: the flow before it; None: the spec's teacher."""
    first, flow = number == 1, f"{template.flow_name}-{number}"
    pairs = template.pairs.model_copy(update=_of(teacher, first=first))
    found: dict[str, Stage] = {f"{template.pairs_name}-{number}": pairs}
    shares = {f"{template.pairs_name}-{number}": 1.0}
    if plan.forward is not None:
        found[f"forward-{number}"] = _inverted(pairs, plan.forward)
        shares = {**dict.fromkeys(shares, 1 - plan.forward), f"forward-{number}": plan.forward}
    options = template.flow.options
    if plan.data_weight is not None:
        options = {**options, DATA_WEIGHT: plan.data_weight}
    changes = {"teacher": teacher, "pairs": shares if len(shares) > 1 else next(iter(shares)), "options": options}
    start = {} if first else {"init": None, "network": None}  # then it starts from the flow before
    found[flow] = template.flow.model_copy(update={**changes, **start})
    steps = template.evaluation.students.get(template.flow_name, FEW_STEPS)
    asked = template.evaluation.model_copy(update=_of(teacher, first=first))
    if not _one_evaluation(template, plan):  # then the last evaluation measures the teacher
        asked = asked.model_copy(update={"teacher_steps": [], "teacher_solvers": {}, "baselines": []})
    measured = evalspec.measuring(asked, {flow: steps}, {flow: template.flow_name})
    found[f"{template.evaluation_name}-{number}"] = measured.model_copy(update={"fine_students": [flow]})
    return list(found.items())


def _inverted(pairs: PairsStage, share: float) -> PairsStage:
    """A stage of pairs from real data to noise.

    Its count is chosen so that at this share of a batch, all pairs are used equally often.
    """
    count = max(1, round(pairs.count * share / (1 - share)))
    solver = pairs.solver if pairs.solver in (AUTO, *inverting_solvers()) else "heun"
    steps = PairsStage.model_fields["steps"].default if pairs.solver == FITTED else pairs.steps
    ends = {"steps": steps, "paths": "forward", "times": None, "optimal_times": None, "store_noise": False}
    return pairs.model_copy(update={**ends, "count": count, "solver": solver})


def _one_evaluation(template: Template, plan: RoundsPlan) -> bool:
    """Whether the last evaluation can be left out, since it would repeat that of the only round."""
    evaluation, ours = template.evaluation, {template.flow_name, *template.distillation}
    same = evaluation.teacher == template.flow.teacher and ours.issuperset(evaluation.students)
    return plan.rounds == 1 and not plan.distill and same


def _of(teacher: str | None, *, first: bool) -> dict[str, object]:
    """The changes of a stage for its teacher. Guidance is used in the first round only: later flows have learnt it."""
    plain = {"guidance_scale": 1.0, "guidance": None, "epsilon_scale": 1.0}
    return {"teacher": teacher} if first else {"teacher": teacher, **plain}


def _distillation(template: Template, resolved: Resolved, flow: str) -> list[tuple[str, Stage]]:
    """(name, stage) of the distillation of the last flow, and of the pairs that this flow generates."""
    ((name, stage),) = template.distillation.items()
    needs = resolved.recipes[name].needs
    found: dict[str, Stage] = {}
    changes: dict[str, str] = {"teacher": flow} if "teacher" in needs else {}
    if stage.init == template.flow_name:
        changes["init"] = flow
    if "pairs" in needs:
        changes["pairs"] = f"{template.pairs_name}-distill"
        found[changes["pairs"]] = template.pairs.model_copy(update=_of(flow, first=False))
    return [*found.items(), (name, stage.model_copy(update=changes))]


def _last_evaluation(template: Template, flows: Sequence[str], plan: RoundsPlan) -> EvaluateStage:
    """The evaluation of all flows and the distilled student against the first teacher."""
    given = template.evaluation.students
    students: dict[str, list[int]] = {name: given.get(template.flow_name, FEW_STEPS) for name in flows}
    for name in template.distillation:
        if plan.distill:
            students = {name: given.get(name, [1]), **students}
    others = {name: steps for name, steps in given.items() if name in template.before}
    measured = evalspec.measuring(template.evaluation, {**students, **others}, dict.fromkeys(flows, template.flow_name))
    fine = [name for name in measured.fine_students if name in others]  # the rounds have already measured the flows
    return measured.model_copy(update={"fine_students": fine})
