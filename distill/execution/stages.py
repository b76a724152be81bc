"""Runs the stages of a spec and writes their files to the run. A completed stage is not repeated.

Modules for evaluation are imported where they are used: their libraries take seconds to import, on every rank.
"""

from functools import partial

import torch

from distill import pairs
from distill.core import file_checksums
from distill.core.atomic import write_json
from distill.core.errors import RunError
from distill.core.stop import StopRequest
from distill.data import update_index
from distill.execution import caching, devices, solving, train_stage
from distill.execution.caching import Caching
from distill.execution.work import Work
from distill.runs import cached
from distill.runs.run_store import RunPaths, append_event
from distill.spec import evalspec, pairspec, resolved
from distill.spec.model import CacheStage, CheckpointTeacher, EvaluateStage, PairsStage, RunSpec, TrainStage
from distill.teachers import conditions
from distill.training import engine
from distill.training.world import ALONE, World


def run(
    paths: RunPaths,
    spec: RunSpec,
    names: list[str],
    stop: StopRequest,
    world: World = ALONE,
    *,
    measure: bool = False,
    part: tuple[int, int] | None = None,
) -> None:
    """Run the stages `names` of a run, in order. A stage is marked as done once it is complete.

    If several ranks work together, rank 0 writes all files, except for shards and for the reports of memory.

    measure: each rank reports the memory that training needs.
    part: (i, n) makes only the shards i, i + n, ... of a pairs or cache stage, which is then not marked as done, and
        writes no events.
    """
    device = devices.place(spec.launch, spec.launch.procs if world.size > 1 else 1, spec.numerics)
    saved = "nothing (no stage had started yet)"
    found = resolved.of_run(spec, paths.root)
    if any(found.reads_images(name) and not paths.stage(name).done.exists() for name in names):
        world.alone("index of the data", partial(update_index, spec.data, paths.root.parent, paths.root))
    _share_checksums(paths, spec, names, world)
    for name in names:
        stop.share(*world.meet(f"before stage {name}", stop.signal is not None))
        stop.raise_if_requested(saved)
        saved = f"stage {name}, which is done"
        stage_paths = paths.stage(name)
        if stage_paths.done.exists():
            continue
        try:
            stage_paths.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot create {stage_paths.root}: {error.strerror}; earlier stages are intact") from error
        stage = spec.stages[name]
        work = Work(paths, found, name, device, stop, world, measure, part)
        if part is not None:
            if isinstance(stage, CacheStage):
                _cache(work)
            else:
                assert isinstance(stage, PairsStage)
                _pairs(work, stage)
            continue
        if world.first:
            threads, where = torch.get_num_threads(), engine.device_name(device)
            append_event(paths, "stage started", stage=name, kind=stage.kind, threads=threads, device=where)
        with devices.explained():
            if isinstance(stage, TrainStage):
                result = train_stage.train(work, stage)
            elif isinstance(stage, PairsStage):
                result = _pairs(work, stage)
            elif isinstance(stage, CacheStage):
                result = _cache(work)
            else:
                result = _evaluate(work, stage)
        if world.first:
            write_json(stage_paths.done, {"stage": name, "kind": stage.kind, **result})
            append_event(paths, "stage done", stage=name)


def _share_checksums(paths: RunPaths, spec: RunSpec, names: list[str], world: World) -> None:
    """Let rank 0 find the checksums of large files, unless they are known, and the other ranks take them over."""
    store, teacher = paths.root.parent, spec.teacher
    if not isinstance(teacher, CheckpointTeacher) or (teacher.conditions is None and spec.cache is None):
        return
    file_checksums.read(store)
    if teacher.conditions is not None:
        world.alone("checksums of the conditions", partial(conditions.keep_checksums, teacher, None, paths.root))
    if spec.cache is not None:
        encoders = any(name == spec.cache and not paths.stage(name).done.exists() for name in names)
        keep = partial(caching.keep_checksums, spec, encoders, store, paths.root)
        world.alone("checksums of the autoencoder and the text encoders", keep)
    file_checksums.read(paths.root)


def _cache(work: Work) -> dict[str, object]:
    """Make the caches of the spec, each rank a part of their shards."""
    run, world, store = work.run, work.world, work.run.root.parent
    part = work.own_part or (0, 1)
    made = Caching.of(work.resolved, store, run.root, indexed=True)
    if world.first:
        cached.note(run, work.name, made.planned)
    for cache in made.planned:
        with work.progress(made.size(cache, part), cache.unit) as progress:
            made.make(cache, work.device, progress, work.stop, part)
        if work.part is None:
            world.wait(f"{cache.what} of the cache", partial(work.stop.raise_if_requested, "its part of the cache"))
    if work.part:
        return {}
    world.alone("removing the records of shards", made.tidy)
    return cached.as_json([made.finished(cache) for cache in made.planned])


def _pairs(work: Work, stage: PairsStage) -> dict[str, object]:
    """Make the pairs of a stage, each rank a part of their shards."""
    folder, part = work.run.stage(work.name).pairs, work.own_part
    with work.progress(pairspec.size(stage, part), "pairs") as progress, solving.opened(work) as solved:
        if work.world.first and work.world.size > 1:
            progress.note(f"{work.world.size} processes make {stage.count:,} pairs; shown is the part of the first one")
        prepare = partial(solved.prepare, folder, progress, work.stop)
        solved = work.world.alone("solver of the pairs", prepare) or prepare()
        solved.generate(folder, progress, work.stop, part)
        if work.part is None:
            work.world.wait("pairs", partial(work.stop.raise_if_requested, "its part of the pairs"))
            work.world.alone("looking at the pairs", partial(pairs.finish, folder, progress))
    return {"count": stage.count, "pairs": str(folder)}


def _evaluate(work: Work, stage: EvaluateStage) -> dict[str, object]:
    from distill.evaluation import measuring, report_page
    from distill.reports import rounds_table

    total, world = evalspec.num_samples(stage, work.resolved.samplers(stage)), work.world
    with work.progress(total, "samples") as progress, work.inputs() as inputs:
        found = measuring.evaluate(
            work.run,
            work.name,
            stage,
            inputs.teacher,
            inputs.own,
            inputs.data,
            seed=work.seed,
            device=work.device,
            progress=progress,
            stop=work.stop,
            like=work.teacher,
            prompts=inputs.texts,
            world=world,
        )
        if found is not None:
            rounds_table.say(found, work.run, progress)

    def report() -> str:
        assert found is not None, "rank 0 has all rows"
        for student in stage.students:
            train_stage.say_measured(work.run, found, student)
        return str(report_page.write(work.run))

    written = world.alone("report", report)
    return {"results": str(work.run.stage(work.name).root / "results.json"), "report": written}
