"""The compute plane's entry: turn one stage of a spec into files of its run. A stage that is done is never redone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from distill import checkpoint, engine, evaluate, pairs, registry, report, teachers, workflow
from distill import data as datasets
from distill.card import StudentCard
from distill.draws import key
from distill.export import export
from distill.guard import InputError
from distill.progress import Progress
from distill.protocols import Recipe, Source
from distill.spec import CheckpointTeacher, EvaluateStage, LaunchSpec, PairsStage, RunSpec, TrainStage
from distill.stop import StopRequest
from distill.store import RunPaths, append_event, write_json
from distill.students.init import StudentInit
from distill.teachers import LoadedTeacher


@dataclass(frozen=True)
class Work:
    """One stage of one run, and where it is computed."""

    run: RunPaths
    spec: RunSpec
    name: str
    device: torch.device
    stop: StopRequest

    @property
    def seed(self) -> int:
        """Every stage draws from a stream of its own."""
        return key(self.spec.seed, self.name)

    def progress(self, total: int, unit: str) -> Progress:
        return Progress(self.name, total, unit, self.run)


def run(paths: RunPaths, spec: RunSpec, names: list[str]) -> None:
    """Compute the stages `names` of a run, in order; each appears done only when it is complete."""
    device = place(spec.launch)
    with StopRequest() as stop:
        for name in names:
            stage_paths = paths.stage(name)
            if stage_paths.done.exists():
                continue
            stage_paths.root.mkdir(parents=True, exist_ok=True)
            stage = spec.stages[name]
            work = Work(paths, spec, name, device, stop)
            append_event(paths, "stage started", stage=name, kind=stage.kind, threads=torch.get_num_threads())
            if isinstance(stage, TrainStage):
                result = _train(work, stage)
            elif isinstance(stage, PairsStage):
                result = _pairs(work, stage)
            else:
                result = _evaluate(work, stage)
            write_json(stage_paths.done, {"stage": name, "kind": stage.kind, **result})
            append_event(paths, "stage done", stage=name)


def place(launch: LaunchSpec) -> torch.device:
    """The device of this process; its CPU threads are those of OMP_NUM_THREADS, which the launcher sets."""
    if launch.threads is not None:
        torch.set_num_threads(launch.threads)
    if launch.device == "cuda" and not torch.cuda.is_available():
        raise InputError("launch.device=cuda, but torch sees no GPU here; use launch.device=auto or cpu")
    if launch.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(launch.device)


def check(spec: RunSpec) -> None:
    """Load the teacher and the data of a spec and refuse what does not fit, before anything is written."""
    data = datasets.load(spec.data, spec.seed)
    if spec.teacher is None:
        return
    teacher = teachers.load(spec.teacher, torch.device("cpu"))
    for stage in spec.stages.values():
        if isinstance(stage, PairsStage | EvaluateStage) and stage.teacher is None:
            teacher.guided(stage.guidance_scale)  # refused where there is no unconditional call
    if data is None:
        return
    if data.shape != teacher.shape:
        raise InputError(
            f"data '{data.name}' has samples of shape {list(data.shape)}, the teacher ({teacher.description}) makes "
            f"{list(teacher.shape)}; use data of the teacher's shape (data.size, data.channels) or another teacher"
        )
    if teacher.num_classes is not None and data.num_classes != teacher.num_classes:
        raise InputError(
            f"data '{data.name}' has {data.num_classes or 'no'} classes, the teacher ({teacher.description}) has "
            f"{teacher.num_classes}; give labelled data with the teacher's classes, or an unconditional teacher"
        )


def _teacher(work: Work, stage: str | None) -> LoadedTeacher | None:
    """The student of a stage, or the spec's teacher where no stage is named; None if there is neither."""
    if stage is not None:
        return teachers.load(CheckpointTeacher(path=str(work.run.student(stage))), work.device)
    return None if work.spec.teacher is None else teachers.load(work.spec.teacher, work.device)


def _teacher_name(spec: RunSpec, stage: TrainStage) -> str:
    """For the model card: which teacher, without the places of this machine."""
    if stage.teacher is not None:
        return f"the student of stage {stage.teacher}"
    assert spec.teacher is not None
    return (
        Path(spec.teacher.path).name
        if isinstance(spec.teacher, CheckpointTeacher)
        else f"{spec.teacher.kind} in closed form"
    )


@dataclass(frozen=True)
class Training:
    """What a train stage trains: its recipe, where networks and batches come from, and what its student will say."""

    recipe: Recipe
    init: StudentInit
    source: Source
    card: StudentCard


def _training(work: Work, stage: TrainStage) -> Training:
    module = registry.load(stage.recipe, work.run.root)
    config = workflow.recipe_config(stage, work.run.root)
    teacher = _teacher(work, stage.teacher) if "teacher" in config.needs else None
    origin = _teacher(work, stage.init) if stage.init else teacher
    source, shape, num_classes = _source(work, stage, config.needs, teacher)
    init = StudentInit(origin, stage.network, shape, num_classes, work.seed)
    recipe = module.Recipe(config, teacher)
    card = StudentCard(
        name=work.name,
        recipe=stage.recipe,
        summary=(module.__doc__ or "").strip().split("\n")[0],
        spec_digest=work.spec.digest(),
        teacher_digest=None if teacher is None else teacher.digest,
        teacher="" if teacher is None else _teacher_name(work.spec, stage),
        data=work.spec.data.kind if "data" in config.needs else "",
        sampler=recipe.sampler,
        shape=shape,
        num_classes=init.num_classes,
        null_class=init.null_class,
        weights=stage.export,
        images=stage.images,
    )
    return Training(recipe, init, source, card)


def _train(work: Work, stage: TrainStage) -> dict[str, object]:
    training = _training(work, stage)
    with work.progress(stage.images, "images") as progress:
        result = engine.train(
            training.recipe,
            training.init,
            training.source,
            stage,
            seed=work.seed,
            device=work.device,
            micro_batch=work.spec.launch.micro_batch or stage.batch_size,
            paths=work.run.stage(work.name),
            progress=progress,
            stop=work.stop,
            run=work.run,
        )
    student = result.networks["student"]
    if stage.export != "raw":
        student.load_state_dict(result.ema["student"][stage.export])
    export(student, work.run.student(work.name), training.card)
    return {"images": result.images, "steps": result.step, "student": str(work.run.student(work.name))}


def export_checkpoint(paths: RunPaths, spec: RunSpec, name: str, weights: Literal["raw"] | float, folder: Path) -> None:
    """Export the student of a train stage from its newest checkpoint, of a run in progress too, to `folder`.

    weights: raw, or one of the stage's half-lives in images.
    """
    stage = spec.stages[name]
    assert isinstance(stage, TrainStage)
    found = checkpoint.latest(paths.stage(name).checkpoints, checkpoint.to_stderr)
    if found is None:
        raise InputError(f"stage '{name}' of run '{paths.name}' has no checkpoint yet; wait for the first one")
    training = _training(Work(paths, spec, name, place(spec.launch), StopRequest()), stage)
    student = training.recipe.networks(training.init)["student"].module
    half_life = None if weights == "raw" else weights
    student.load_state_dict(checkpoint.weights(paths.stage(name).checkpoints, "student", half_life))
    export(student, folder, training.card.model_copy(update={"weights": weights, "images": found.meta.images}))


def _source(
    work: Work, stage: TrainStage, needs: frozenset[str], teacher: LoadedTeacher | None
) -> tuple[Source, tuple[int, ...], int | None]:
    """Where the stage's batches come from, the shape of a sample and the number of classes."""
    if "pairs" in needs:
        assert stage.pairs is not None and teacher is not None, "workflow.check lets no such stage through"
        pair_set = pairs.PairSet.open(work.run.stage(stage.pairs).pairs, teacher.digest)
        return pairs.PairSource(pair_set, stage.batch_size, work.seed), teacher.shape, teacher.num_classes
    data = datasets.load(work.spec.data, work.seed)
    assert data is not None, "workflow.check lets no such stage through"
    return datasets.DataSource(data, stage.batch_size, work.seed), data.shape, data.num_classes


def _pairs(work: Work, stage: PairsStage) -> dict[str, object]:
    teacher = _teacher(work, stage.teacher)
    assert teacher is not None, "workflow.check lets no such stage through"
    folder = work.run.stage(work.name).pairs
    with work.progress(stage.count, "pairs") as progress:
        pairs.generate(teacher, stage, folder, seed=work.seed, device=work.device, progress=progress, stop=work.stop)
    return {"count": stage.count, "pairs": str(folder)}


def _evaluate(work: Work, stage: EvaluateStage) -> dict[str, object]:
    with work.progress(evaluate.total(stage), "samples") as progress:
        evaluate.evaluate(work.run, work.spec, work.name, device=work.device, progress=progress, stop=work.stop)
    return {"results": str(work.run.stage(work.name).root / "results.json"), "report": str(report.write(work.run))}
