"""Validation of pairs stages and of the pairs of train stages. Does not import torch."""

import math
from collections.abc import Iterator

from distill.core.errors import InputError
from distill.solvers import find_solver
from distill.spec import guidancespec
from distill.spec.apportion import rows_by_share
from distill.spec.guidancespec import FieldSettings
from distill.spec.kinds import AUTO, FITTED, either, inverting_solvers
from distill.spec.layout import Layout, excess
from distill.spec.model import WITH_STATES, PairsStage, RunSpec, TrainStage, is_path

STEPS_TO_TRY = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)
MAX_FITTED_STEPS = 64  # the number of weights of a fitted solver is quadratic


def size(stage: PairsStage, part: tuple[int, int] | None = None) -> int:
    """Number of pairs of a stage, or of the shards of one part (i, n)."""
    layout = Layout.of(stage)
    return layout.items(layout.part(part))


def mistakes(stage: PairsStage, prefix: str) -> Iterator[str]:
    """The mistakes in a pairs stage that can be found without the rest of the spec."""
    yield from _too_many_files(stage, prefix)
    if stage.shard % stage.block:
        nearest = max(stage.block, round(stage.shard / stage.block) * stage.block)
        yield f"{prefix}shard: {stage.shard} is not a multiple of block ({stage.block}); nearest: {nearest}"
    if stage.solver == AUTO:
        yield from _auto(stage, prefix)
    elif stage.tolerance is not None:
        yield f"{prefix}tolerance: has no effect with solver: {stage.solver}; remove it, or use solver: {AUTO}"
    if stage.solver == FITTED:
        yield from _fitted(stage, prefix)
    elif stage.paths == "forward" and stage.solver != AUTO and find_solver(stage.solver).calls_inverting is None:
        valid = either(inverting_solvers())
        yield f"{prefix}solver: {stage.solver} solves only from noise to data; with paths: forward, use {valid}"
    if stage.optimal_times is not None:
        yield from _optimal(stage, stage.optimal_times, prefix)
    elif stage.paths in WITH_STATES:
        yield from _times(stage, prefix)
    elif stage.times is not None:
        yield f"{prefix}times: has no effect with paths: {stage.paths}, which store no states in between; remove it"
    yield from guidancespec.mistakes(stage.field_settings, prefix)
    if stage.store_noise and stage.paths == "forward":
        yield f"{prefix}store_noise: has no effect with paths: forward, which always store the noise; remove it"


def steps_to_try(stage: PairsStage) -> list[int]:
    """The numbers of steps among which `solver: auto` chooses: those whose grids contain the times of the states."""
    return [steps for steps in STEPS_TO_TRY if not _outside(stage.times or [], steps)]


def _auto(stage: PairsStage, prefix: str) -> Iterator[str]:
    if stage.steps != PairsStage.model_fields["steps"].default:
        yield f"{prefix}steps: has no effect with solver: {AUTO}, which finds the number of steps; remove it"
    if stage.optimal_times is not None:
        yield f"{prefix}optimal_times: does not work with solver: {AUTO}; name a solver and its steps"
    elif not steps_to_try(stage):
        yield f"{prefix}times: {stage.times} given; with solver: {AUTO}, times must be multiples of 1/2, ..., 1/128"


def _fitted(stage: PairsStage, prefix: str) -> Iterator[str]:
    if stage.field_settings != FieldSettings(stage.guidance_scale):
        yield (
            f"{prefix}solver: {FITTED} works with guidance_scale only; remove guidance and epsilon_scale, or name "
            "another solver"
        )
    if stage.paths != "backward":
        yield (
            f"{prefix}solver: {FITTED} is fitted to the ends of paths from noise, so it cannot solve paths: "
            f"{stage.paths}; name another solver"
        )
    if stage.steps > MAX_FITTED_STEPS:
        yield f"{prefix}steps: {stage.steps} given; with solver: {FITTED}, at most {MAX_FITTED_STEPS}"


def _outside(times: list[float], steps: int) -> list[float]:
    """The times that are not multiples of 1/steps."""
    return [t for t in times if not math.isclose(t * steps, round(t * steps), abs_tol=1e-6)]


def _too_many_files(stage: PairsStage, prefix: str) -> Iterator[str]:
    if wrong := excess(Layout.of(stage), stage.block, "pairs", f"{prefix}shard"):
        yield f"{wrong}, or give a smaller count"


def times_of(spec: RunSpec, stage: TrainStage) -> list[float] | None:
    """The times of the states of a train stage's paths; None if its pairs stages differ in them.

    With `optimal_times`, these are uniform times as a placeholder: optimal ones are found during generation.
    """
    solved = [spec.stages[name] for name in stage.pair_shares]
    found = [each.times_of_states for each in solved if isinstance(each, PairsStage)]
    return found[0] if found and all(times == found[0] for times in found) else None


def _optimal(stage: PairsStage, steps: int, prefix: str) -> Iterator[str]:
    if stage.paths != "trajectories":
        yield f"{prefix}optimal_times: does not work with paths: {stage.paths}; remove it, or use paths: trajectories"
    if stage.times is not None:
        yield f"{prefix}times: cannot be given together with optimal_times; remove one"
    if steps > stage.steps:
        yield f"{prefix}optimal_times: {steps} is more than the {stage.steps} steps of the solver; increase steps"


def _times(stage: PairsStage, prefix: str) -> Iterator[str]:
    times = stage.times or []
    if not is_path(times):
        yield f"{prefix}times: {stage.times} given; {stage.paths} need times decreasing from 1 to 0, like [1, 0.5, 0]"
        return
    strange = _outside(times, stage.steps)
    if strange and stage.solver != AUTO:
        yield (
            f"{prefix}times: {', '.join(f'{t:g}' for t in strange)} given; times must be multiples of 1/steps = "
            f"1/{stage.steps}, the step size of the solver"
        )


def of_training(spec: RunSpec, stage: TrainStage, needs: frozenset[str], where: str) -> Iterator[str]:
    """The mistakes in the pairs of a train stage.

    The pairs must come from the stage's teacher and be of a kind that the recipe can use. Their shares must sum to 1.
    """
    shares, found = stage.pair_shares, []
    if not (math.isclose(sum(shares.values()), 1) and all(shares.values())):
        given = ", ".join(f"{name}: {share:g}" for name, share in shares.items())
        yield f"{where}: {{{given}}} given; the fractions must be greater than 0 and add up to 1"
    else:
        try:
            rows_by_share(stage.batch_size, list(shares.values()))
        except InputError as error:
            yield f"{where}: {error}"
    for name in shares:
        solved = spec.stages.get(name)
        if not isinstance(solved, PairsStage):
            continue  # `checks._references` reports it
        found.append(solved)
        if solved.teacher != stage.teacher:
            theirs, ours = (
                f"the student of stage '{each}'" if each else "the spec's teacher"
                for each in (solved.teacher, stage.teacher)
            )
            yield (
                f"{where}: '{name}' has pairs of {theirs}, but this stage's teacher is {ours}; set the same teacher in "
                "both stages"
            )
        if "states" in needs and solved.paths not in WITH_STATES:
            yield (
                f"{where}: {stage.recipe} needs states along the paths, but '{name}' does not store them (paths: "
                f"{solved.paths}); use paths: {' or '.join(WITH_STATES)}"
            )
        if "states" not in needs and solved.paths == "segments":
            yield (
                f"{where}: '{name}' has segments of paths, but {stage.recipe} needs whole paths from noise to data; "
                "use paths: backward, forward or trajectories"
            )
    if len({each.guidance_scale for each in found}) > 1:
        yield f"{where}: the pairs stages have different guidance scales; use the same guidance_scale"
    elif len({each.field_settings for each in found}) > 1:
        yield f"{where}: the pairs stages have different guidance or epsilon_scale; use the same"
    if "states" in needs and len({each.num_states for each in found}) > 1:
        yield f"{where}: the pairs stages store different numbers of states per path; use the same times"
