"""What is wrong with a pairs stage, and with the pairs of a train stage. No tensors."""

import math
from collections.abc import Iterator, Sequence

from distill import nfe
from distill.spec import PairsStage, RunSpec, TrainStage, is_path

OF_DATA, WITH_STATES = ("forward", "segments"), ("trajectories", "segments")  # paths of a pairs stage
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}


def calls(stage: PairsStage) -> float:
    """Calls of the teacher's network for one pair, guidance counted; of segments on average."""
    number = float(nfe.network_calls(stage.solver, stage.steps))
    if stage.solver == "heun" and stage.paths == "forward":
        number += 1  # no step ends at t = 0
    if stage.paths == "segments":
        number /= max(1, len(stage.times or []) - 1)
    return number * nfe.per_velocity(stage.guidance_scale)


def bytes_per_pair(stage: PairsStage, shape: Sequence[int]) -> int:
    """On disk, headers and labels aside."""
    states = 1 if stage.paths == "segments" else num_states(stage) - 2
    stored = (1 + states) * BYTES[stage.dtype]
    return math.prod(shape) * (stored + (4 if stage.store_noise or stage.paths == "forward" else 0))


def mistakes(stage: PairsStage, prefix: str) -> Iterator[str]:
    """What is wrong with a pairs stage by itself."""
    if stage.shard % stage.block:
        nearest = max(stage.block, round(stage.shard / stage.block) * stage.block)
        yield f"{prefix}shard: {stage.shard} is not a multiple of block ({stage.block}); nearest: {nearest}"
    if stage.paths == "forward" and stage.solver not in ("euler", "heun"):
        yield f"{prefix}solver: {stage.solver} solves from noise to data only; paths: forward take euler or heun"
    if stage.optimal_times is not None:
        yield from _optimal(stage, stage.optimal_times, prefix)
    elif stage.paths in WITH_STATES:
        yield from _times(stage, prefix)
    elif stage.times is not None:
        yield f"{prefix}times: {stage.paths} paths keep their ends alone, so this has no effect; remove it"
    if stage.store_noise and stage.paths == "forward":
        yield f"{prefix}store_noise: inverted noise is always stored, so this has no effect; remove it"


def times_of(spec: RunSpec, stage: TrainStage) -> list[float] | None:
    """The times of the states that a train stage's paths will have, where all have the same; uniform ones in place of
    the optimal, which are found when the pairs are made.
    """
    solved = [spec.stages[name] for name in stage.pair_shares]
    found = [_planned(each) for each in solved if isinstance(each, PairsStage)]
    return found[0] if found and all(times == found[0] for times in found) else None


def _planned(stage: PairsStage) -> list[float] | None:
    steps = stage.optimal_times
    return stage.times if steps is None else [(steps - i) / steps for i in range(steps + 1)]


def num_states(stage: PairsStage) -> int:
    """Of each path, its ends included."""
    return len(_planned(stage) or [1, 0]) if stage.paths == "trajectories" else 2


def _optimal(stage: PairsStage, steps: int, prefix: str) -> Iterator[str]:
    if stage.paths != "trajectories":
        yield f"{prefix}optimal_times: {stage.paths} paths have none; remove it, or use paths: trajectories"
    if stage.times is not None:
        yield f"{prefix}times: optimal_times finds them, so both cannot be given; remove one"
    if steps > stage.steps:
        yield f"{prefix}optimal_times: {steps} steps cannot be chosen among the solver's {stage.steps}; give more steps"


def _times(stage: PairsStage, prefix: str) -> Iterator[str]:
    times = stage.times or []
    if not is_path(times):
        yield f"{prefix}times: {stage.times} given; {stage.paths} need times from 1 down to 0, like [1, 0.5, 0]"
        return
    strange = [t for t in times if not math.isclose(t * stage.steps, round(t * stage.steps), abs_tol=1e-6)]
    if strange:
        yield (
            f"{prefix}times: {', '.join(f'{t:g}' for t in strange)} are none of the solver's own, the multiples of "
            f"1/steps = 1/{stage.steps}"
        )


def of_training(spec: RunSpec, stage: TrainStage, needs: frozenset[str], where: str) -> Iterator[str]:
    """Whether the pairs of a train stage are its teacher's, of the kind that its recipe takes, in parts that add up."""
    shares, found = stage.pair_shares, []
    if not (math.isclose(sum(shares.values()), 1) and all(shares.values())):
        parts = ", ".join(f"{name}: {share:g}" for name, share in shares.items())
        yield f"{where}: the parts {{{parts}}} must be above 0 and add up to 1"
    for name in shares:
        solved = spec.stages.get(name)
        if not isinstance(solved, PairsStage):
            continue  # said where references are
        found.append(solved)
        if solved.teacher != stage.teacher:
            theirs, ours = (each or "the spec's teacher" for each in (solved.teacher, stage.teacher))
            yield f"{where}: '{name}' has pairs of {theirs}, this stage's teacher is {ours}; make them agree"
        if "states" in needs and solved.paths not in WITH_STATES:
            yield (
                f"{where}: {stage.recipe} needs states along the paths, '{name}' has ends alone (paths: "
                f"{solved.paths}); use paths: {' or '.join(WITH_STATES)}"
            )
        if "states" not in needs and solved.paths == "segments":
            yield (
                f"{where}: '{name}' has segments, which begin with noised data and do not end at data; {stage.recipe} "
                "takes whole paths; use paths: backward, forward or trajectories"
            )
    if len({each.guidance_scale for each in found}) > 1:
        yield f"{where}: pairs of different guidance_scale would teach two things at once; make them agree"
    if "states" in needs and len({num_states(each) for each in found}) > 1:
        yield f"{where}: paths of different numbers of states do not fit into one batch; give them the same times"
