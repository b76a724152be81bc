"""Describes what a run would do, stage by stage, before it is started."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from distill.runs.run_store import RunPaths
from distill.spec import cacheuse, evalspec, pairspec
from distill.spec.kinds import AUTO, FITTED
from distill.spec.layout import Layout
from distill.spec.model import (
    OF_DATA,
    WITH_STATES,
    CacheStage,
    CheckpointTeacher,
    EvaluateStage,
    LaunchSpec,
    NetworkStage,
    PairsStage,
    RunSpec,
    SlurmSpec,
    Stage,
    TrainStage,
)
from distill.spec.resolved import Resolved

CHECKS = (
    "every field of the spec",
    "references between stages",
    "recipes, their options and needs",
    "teacher and data fit",
)


@dataclass(frozen=True)
class PlannedStage:
    """The description of one stage of a plan."""

    name: str
    kind: str
    what: str
    work: str
    needs: list[str]
    """stages that it depends on, and its inputs from the spec"""
    network_calls: int | None
    """number of samples passed through a network; None for training, where it depends on the recipe"""
    writes: list[str]
    """files and folders that it writes, relative to the run; STORE is the store"""


def steps(resolved: Resolved) -> list[PlannedStage]:
    """The descriptions of all stages, in order."""
    found = [_step(resolved, name) for name in resolved.spec.stages]
    cache = resolved.spec.cache
    waiting = [] if cache is None else [cache]
    return [each if each.name == cache else replace(each, needs=_unique([*waiting, *each.needs])) for each in found]


def _step(resolved: Resolved, name: str) -> PlannedStage:
    stage = resolved.spec.stages[name]
    if isinstance(stage, TrainStage):
        return _train(name, stage, resolved.spec.launch, resolved.needs(name))
    if isinstance(stage, PairsStage):
        return _pairs(name, stage)
    if isinstance(stage, CacheStage):
        return _cache(name, stage, resolved)
    return _evaluate(name, stage, resolved.samplers(stage))


def as_json(spec: RunSpec, paths: RunPaths, planned: list[PlannedStage]) -> dict[str, Any]:
    """The plan as JSON-serialisable data."""
    return {
        "name": spec.name,
        "digest": spec.digest(),
        "run": str(paths.root),
        "exists": paths.root.exists(),
        "stages": [asdict(step) for step in planned],
        "checked": list(CHECKS),
    }


def miniature(spec: RunSpec) -> RunSpec:
    """A miniature of a run, for measuring: two steps of each training, on at most one block of pairs.

    Pairs are generated with one Euler step. Only paths that keep states use all solver steps, since their states are at
    times of these steps. The evaluations are unchanged.
    """
    stages: dict[str, Stage] = {}
    for name, stage in spec.stages.items():
        stages[name] = stage
        if isinstance(stage, TrainStage):
            images = min(stage.images, 2 * stage.batch_size)
            optimizer = stage.optimizer.model_copy(update={"warmup_images": 0})
            stages[name] = stage.model_copy(update={"images": images, "optimizer": optimizer, "ema_snapshots": None})
        elif isinstance(stage, PairsStage):
            few = {"count": min(stage.count, stage.block)}
            if stage.paths not in WITH_STATES:
                stage = stage.solved_by("euler", 1)
            elif stage.solver == AUTO:
                stage = stage.solved_by("heun", pairspec.steps_to_try(stage)[0])
            stages[name] = stage.model_copy(update=few)
    here = spec.launch.model_copy(update={"slurm": SlurmSpec()})  # there are too few shards for an array
    return spec.model_copy(update={"stages": stages, "launch": here})


def memory_rows(memory: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, str, int | None, list[int]]]:
    """(stage, what, predicted bytes, bytes of each rank) for each row of the memory table.

    memory: stage -> the reports of `memory.Probe` of its ranks.
    """
    for stage, ranks in memory.items():
        predicted, counted = ranks[0]["predicted"], [rank["counted"] for rank in ranks]
        for kind, expected in predicted.items():
            yield stage, kind, expected, [each[kind] for each in counted]
        yield stage, "sum of these", sum(predicted.values()), [sum(each.values()) for each in counted]
        for label, key in (("activations", "activations"), ("other tensors", "other")):
            yield stage, label, None, [rank[key] for rank in ranks]
        yield stage, "checkpoint copy (CPU memory)", None, [rank["saving"] for rank in ranks]
        yield stage, "whole process (CPU memory)", None, [rank["process"] for rank in ranks]
        if ranks[0]["device"] is not None:
            yield stage, "allocated by torch (GPU)", None, [rank["device"] for rank in ranks]


def _teacher(stage: NetworkStage) -> str:
    return stage.teacher or "the spec's teacher"


def _teachers(stage: NetworkStage) -> list[str]:
    """The teacher, and the stage of the weak model, if there is one."""
    weak = None if stage.guidance is None else stage.guidance.weak
    return [_teacher(stage), *([] if weak is None else [weak])]


def _train(name: str, stage: TrainStage, launch: LaunchSpec, needs: frozenset[str]) -> PlannedStage:
    teacher = _teacher(stage)
    sources = {"pairs": [*stage.pair_shares], "data": ["data"], "teacher": _teachers(stage)}
    taken = [each for need in sorted(needs & sources.keys()) for each in sources[need]]
    taken += [stage.init] if stage.init else []
    start = f"a new {stage.network.kind}" if stage.network else f"the weights of {stage.init or teacher}"
    if stage.student is not None:
        start = f"a network of another size with weights of {stage.init or teacher}"
    if stage.lora:
        start += f", LoRA ({', '.join(f'{role}: rank {each.rank}' for role, each in stage.lora.items())})"
    work = f"{stage.images:,} images = {stage.images // stage.batch_size:,} student updates of {stage.batch_size}"
    share = stage.batch_size // launch.world_size
    micro = launch.known_micro_batch or share
    if launch.micro_batch == "auto":
        work += f": {launch.world_size} x auto (processes, micro-batches that fit into memory)"
    elif micro < stage.batch_size:
        work += f": {launch.world_size} x {share // micro} x {micro} (processes, micro-batches, samples)"
    writes = [f"stages/{name}/checkpoints/", f"students/{name}/"]
    if stage.ema_snapshots is not None:
        writes.insert(1, f"stages/{name}/snapshots/")
    return PlannedStage(name, stage.kind, f"{stage.recipe} from {start}", work, _unique(taken), None, writes)


def _pairs(name: str, stage: PairsStage) -> PlannedStage:
    calls = stage.network_calls
    solver = f"solver {AUTO}" if stage.solver == AUTO else f"{stage.solver}, {stage.steps} steps"
    what = f"{solver}, {stage.field_settings.words}"
    what += "" if stage.paths == "backward" else f", {stage.paths}"
    what += ", which is fitted first if the store does not have it" if stage.solver == FITTED else ""
    total = round(stage.count * calls)
    about = "about " if stage.field_settings.varies or stage.solver == AUTO else ""  # it depends on the teacher
    work = f"{stage.count:,} pairs x {about}{calls:g} network calls = {about}{total:,}"
    shards = Layout.of(stage).files
    writes = [f"stages/{name}/pairs/ ({shards} shard{'s' if shards > 1 else ''})"]
    needs = _unique([*_teachers(stage), *(["data"] if stage.paths in OF_DATA else [])])
    return PlannedStage(name, stage.kind, what, work, needs, total, writes)


def _evaluate(name: str, stage: EvaluateStage, samplers: Mapping[str, str]) -> PlannedStage:
    calls = stage.samples * sum(evalspec.calls(stage, samplers).values())
    about = "about " if stage.field_settings.varies or stage.fine_tolerance is not None else ""
    work = f"{evalspec.num_rows(stage, samplers)} rows x {stage.samples:,} samples; {about}{calls:,} network calls"
    needs = _unique([*_teachers(stage), *stage.students])
    coarse = f"at {', '.join(map(str, stage.teacher_steps))} steps and " if stage.teacher_steps else "by "
    fine = f"{stage.fine_solver} {stage.fine_steps if stage.fine_tolerance is None else f'{stage.fine_tolerance:g}'}"
    others = "".join(f", {solver} {steps}" for solver, each in stage.teacher_solvers.items() for steps in each)
    what = f"teacher {coarse}{fine}{others}" + "".join(f"; {student} by {fine}" for student in stage.fine_students)
    what += "".join(f"; guidance {scale:g} by {fine}" for scale in stage.guidance_scales)
    what += f"; {stage.field_settings.more_words}" if stage.field_settings.more_words else ""
    writes = [f"stages/{name}/results.json", f"stages/{name}/pictures/", "report.html"]
    return PlannedStage(name, stage.kind, what, work, needs, calls, writes)


def _cache(name: str, stage: CacheStage, resolved: Resolved) -> PlannedStage:
    spec, parts = resolved.spec, {"latents": cacheuse.stores_latents(resolved)}
    parts["prompts"] = cacheuse.may_store_prompts(spec)
    kinds = {"latents": f"images as {stage.latents or 'latents'}", "prompts": "embeddings of prompts"}
    if stage.latents is None and not isinstance(spec.teacher, CheckpointTeacher):
        kinds["latents"] = "images as pixels"
    what = " and ".join(words for part, words in kinds.items() if parts[part])
    size = spec.launch.world_size
    work = f"all of the data that is not in the store yet, by {size} process{'es' if size > 1 else ''}"
    writes = [f"STORE/caches/{part}-*/" for part, stored in parts.items() if stored]
    needs = ["data", *([] if spec.teacher is None else ["the spec's teacher"])]
    return PlannedStage(name, stage.kind, what, work, needs, None, writes)


def _unique(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))
