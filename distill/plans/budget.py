"""Converts the budget of a comparison from minutes to images, by speeds measured in a short run (the rehearsal).

The lengths of a chain are scaled by one factor, so that its training takes the given minutes. The result is an ordinary
spec: its numbers do not depend on how long the run really takes.
"""

import math
from collections.abc import Mapping

from distill.core.errors import InputError
from distill.core.records import read_json
from distill.exchange import student_card
from distill.plans import planning
from distill.plans.comparison import Chain, ComparisonPlan
from distill.reports.comparison_table import ComparedRecipe, Comparison, Measured, TrainedPart
from distill.runs.run_store import RunPaths, read_events
from distill.spec import evalspec
from distill.spec.model import PairsStage, RunSpec, Stage, TrainStage

# Default numbers of steps to measure a student at: if it accepts any number, and if it accepts only some.
STEPS, OWN_STEPS = (1, 2, 4), (1, 2, 4, 8)
BATCHES, UNTIMED = 24, 4  # batches of each training in a rehearsal; the first of them are slower and not timed
MOST_MINUTES = 1_000_000  # two years
IN_IMAGES = "_images"  # suffix of options that are lengths, like anneal_images


def rehearsal(planned: ComparisonPlan) -> RunSpec:
    """The spec of the rehearsal: a miniature of the run, with enough steps of the compared stages to time them."""
    small = planning.miniature(planned.spec())
    longer: dict[str, Stage] = {}
    for chain in planned.chains:
        for name in chain.trained:
            stage = small.stages[name]
            assert isinstance(stage, TrainStage)
            longer[name] = stage.model_copy(update={"images": BATCHES * stage.batch_size})
    return small.model_copy(update={"stages": {**small.stages, **longer}})


def measured(planned: ComparisonPlan, run: RunPaths) -> dict[str, Measured]:
    """Train stage -> measurements, from the run of a rehearsal."""
    return {name: _measured(run, name, stage) for chain in planned.chains for name, stage in chain.trained.items()}


def frozen(
    planned: ComparisonPlan, found: Mapping[str, Measured], minutes: float, command: str
) -> tuple[RunSpec, Comparison]:
    """(spec, record) of a comparison whose chains each take the given minutes, according to the measurements.

    found: see `measured`. Raises InputError if the minutes are too short for a chain.
    """
    changed: dict[str, Stage] = {}
    entries = []
    for chain in planned.chains:
        scaled = _scaled(chain, found, minutes)
        changed |= scaled
        parts = [TrainedPart(stage=n, recipe=s.recipe, images=s.images, measured=found[n]) for n, s in scaled.items()]
        solved = [{**planned.shared, **chain.stages}[name] for name in chain.pairs]
        pair_calls = sum(stage.count * stage.network_calls for stage in solved if isinstance(stage, PairsStage))
        entries.append(ComparedRecipe(name=chain.name, recipe=chain.recipe, parts=parts, pair_calls=pair_calls))
    students = {
        chain.name: planned.evaluation.students.get(chain.name) or _steps(found[chain.name]) for chain in planned.chains
    }
    changed[planned.evaluation_name] = evalspec.measuring(planned.evaluation, students)
    comparison = Comparison(
        command=command, budget_minutes=minutes, evaluation=planned.evaluation_name, entries=entries
    )
    return planned.spec(changed), comparison


def check(minutes: float) -> None:
    """Raise InputError unless the minutes are a valid budget."""
    if not 0 < minutes <= MOST_MINUTES:
        raise InputError(
            f"--budget {minutes:g}: give minutes of training for each recipe, above 0 and at most "
            f"{MOST_MINUTES:,}, like 2"
        )


def _measured(run: RunPaths, name: str, stage: TrainStage) -> Measured:
    events = [e for e in read_events(run) if e.get("event") == "progress" and e.get("label") == name]
    timed = [(e["done"], e["time"]) for e in events if e["done"] >= UNTIMED * stage.batch_size]
    (first, began), (last, ended) = timed[0], timed[-1]
    ranks = [read_json(path) for path in sorted(run.stage(name).root.glob("memory-*.json"))]
    return Measured(
        seconds_per_image=float(f"{max(ended - began, 1e-3) / (last - first):.4g}"),
        memory=max(sum(rank["counted"].values()) + rank["activations"] for rank in ranks),
        teacher_calls=sum(rank["teacher_rows"] for rank in ranks) / last,
        steps=sorted(student_card.read(run.student(name)).t_grids),
    )


def _scaled(chain: Chain, found: Mapping[str, Measured], minutes: float) -> dict[str, TrainStage]:
    """The train stages of a chain, scaled by one factor to the given minutes, in whole batches."""
    trained = chain.trained
    whole = sum(stage.images * found[name].seconds_per_image for name, stage in trained.items()) / 60
    least, short = max((stage.batch_size / stage.images, name) for name, stage in trained.items())
    factor = minutes / whole
    if factor < least:
        raise InputError(
            f"--budget {minutes:g}: too short for '{chain.name}': less than one batch of '{short}' fits; give at least "
            f"{1.01 * least * whole:.3g} minutes"
        )
    return {name: _of_length(stage, factor) for name, stage in trained.items()}


def _of_length(stage: TrainStage, factor: float) -> TrainStage:
    """A stage with all lengths scaled. Half-lives are not scaled, since `export` selects weights by them."""
    optimizer, saving = stage.optimizer, stage.checkpoint
    images = max(1, math.floor(factor * stage.images / stage.batch_size)) * stage.batch_size
    share = images / stage.images  # the rounded factor, so that warm-up and the like still end within the training
    return stage.model_copy(
        update={
            "images": images,
            "optimizer": optimizer.model_copy(update={"warmup_images": math.floor(share * optimizer.warmup_images)}),
            "checkpoint": saving.model_copy(
                update={"images": None if saving.images is None else max(1, round(share * saving.images))}
            ),
            "ema_snapshots": None if stage.ema_snapshots is None else max(1, round(share * stage.ema_snapshots)),
            "options": {
                key: max(1, round(share * value)) if key.endswith(IN_IMAGES) and isinstance(value, int) else value
                for key, value in stage.options.items()
            },
        }
    )


def _steps(found: Measured) -> list[int]:
    """Default numbers of steps to measure a student at."""
    if not found.steps:
        return list(STEPS)
    return [n for n in OWN_STEPS if n in found.steps] or found.steps[:1]
