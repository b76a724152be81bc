"""What a stage computes from: its teacher, the paths to solve, the batches to train on."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill import data as datasets
from distill import pairs, pairspec, schedules, teachers
from distill.data import DataSet
from distill.draws import key
from distill.guard import InputError, RunError
from distill.pairs import accuracy, paths
from distill.pairs.accuracy import Accuracy
from distill.pairs.paths import Real
from distill.printing import say_error
from distill.progress import Progress
from distill.protocols import Source
from distill.spec import (
    CheckpointTeacher,
    EvaluateStage,
    GaussianTeacher,
    HfData,
    ImagesData,
    MixtureTeacher,
    PairsStage,
    RunSpec,
    Stage,
    TrainStage,
)
from distill.stop import StopRequest
from distill.store import RunPaths, read_json
from distill.teachers import LoadedTeacher
from distill.world import ALONE, World


def teacher(run: RunPaths, spec: RunSpec, stage: str | None, device: torch.device) -> LoadedTeacher | None:
    """The student of a stage, or the spec's teacher where no stage is named; None if there is neither.

    Neither is probed: students are compared at their export, and the spec's teacher is checked before a run begins.
    """
    if stage is not None:
        return teachers.load(CheckpointTeacher(path=str(run.student(stage))), device, probe=False)
    return None if spec.teacher is None else teachers.load(spec.teacher, device, probe=False)


def exact_data(spec: RunSpec) -> Callable[[int, Sequence[int]], Tensor] | None:
    """Samples of the spec's own teacher, (seed, indices) -> samples, where it is known in closed form."""
    if isinstance(spec.teacher, GaussianTeacher | MixtureTeacher):
        return teachers.load(spec.teacher, torch.device("cpu")).exact_data
    return None


def check_shapes(teacher: LoadedTeacher, data: DataSet) -> None:
    """Refuse data that is not of the teacher's shape and classes. Labels that no network knows: `check_labels`."""
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


def check_labels(spec: RunSpec, teacher: LoadedTeacher, data: DataSet) -> None:
    """Refuse a label_column that nothing can use, as the teacher knows no classes; else `note_labels`.

    A fresh network of a recipe without a teacher may learn them, and an evaluation has features that tell them apart.
    """
    elsewhere = [stage for stage in spec.stages.values() if isinstance(stage, EvaluateStage) or _has_own_network(stage)]
    if isinstance(spec.data, HfData) and _left_out(teacher, data) and not elsewhere:
        raise InputError(
            f"data.label_column={spec.data.label_column} has no effect: the teacher ({teacher.description}) is "
            "unconditional; remove it, or give a teacher with classes"
        )
    note_labels(teacher, data)


def note_labels(teacher: LoadedTeacher, data: DataSet) -> None:
    """Say on stderr that the labels of the data are left out, where they are."""
    if not _left_out(teacher, data):
        return
    say_error(
        f"note: data '{data.name}' has {data.num_classes} classes, but the teacher ({teacher.description}) is "
        "unconditional: what learns from it is trained without labels"
    )


def _left_out(teacher: LoadedTeacher, data: DataSet) -> bool:
    return data.num_classes is not None and teacher.num_classes is None


def _has_own_network(stage: Stage) -> bool:
    return isinstance(stage, TrainStage) and stage.network is not None


def refuse_different(run: RunPaths, spec: RunSpec, stage: TrainStage, inputs: Mapping[str, str], world: World) -> None:
    """RunError where a rank has read other inputs than rank 0, by their digests; all ranks must call this."""
    if world.size == 1 or not inputs:
        return
    ours = torch.tensor([list(hashlib.sha256(digest.encode()).digest()) for digest in inputs.values()])
    first = ours.clone()
    with world.contact("comparing inputs"):
        world.share([first])
    other = world.meet("after comparing inputs", *(ours != first).any(1).tolist())
    places = {"data": spec.data.path if isinstance(spec.data, ImagesData | HfData) else spec.data.kind}
    if stage.teacher is not None:
        places["teacher"] = str(run.student(stage.teacher))
    elif spec.teacher is not None:
        places["teacher"] = spec.teacher.path if isinstance(spec.teacher, CheckpointTeacher) else spec.teacher.kind
    places["init"] = places.get("teacher", "") if stage.init is None else str(run.student(stage.init))
    different = [f"{name} ({places[name]})" for name, is_other in zip(inputs, other, strict=True) if is_other]
    if different:
        raise RunError(
            f"the ranks have read different inputs: {', '.join(different)}; it changed while they read it, or is not "
            "the same on all machines; nothing was trained since the last save: make it the same, then resume"
        )


def batches(
    run: RunPaths,
    stage: TrainStage,
    *,
    seed: int,
    data: DataSet | None,
    labels: bool,
    teacher_digest: str | None,
    world: World = ALONE,
) -> tuple[Source, dict[str, str]]:
    """Where the batches of a train stage come from, and the digests of its pairs. data: what is real in them; labels:
    whether with its classes. world: the ranks that train on them, all of which must call this.
    """
    real = None if data is None else datasets.DataSource(data, stage.batch_size, seed, labels=labels)
    if not stage.pair_shares:
        assert real is not None, "workflow.check lets no such stage through"
        return real, {}
    counts = pairspec.parts(stage.batch_size, list(stage.pair_shares.values()))
    folders = [run.stage(name).pairs for name in stage.pair_shares]
    sets = [pairs.PairSet.open(folder, teacher_digest, world.rank, world.size) for folder in folders]
    world.meet("after the checksums of the pairs")  # each rank has compared a part of them
    sources = [pairs.PairSource(each, count, seed) for each, count in zip(sets, counts, strict=True)]
    source = sources[0] if len(sources) == 1 else pairs.Mixed(sources, counts)
    digests = {"pairs": " ".join(each.manifest.digest for each in sets)}
    return source if real is None else pairs.Beside(source, real), digests


def pair_times(run: RunPaths, spec: RunSpec, name: str) -> list[float] | None:
    """The times of the states of a train stage's pairs, where all have the same; remembered when they are deleted."""
    stage = spec.stages[name]
    assert isinstance(stage, TrainStage)
    found = [pairs.manifest.read(run.stage(each).pairs) for each in stage.pair_shares]
    times = [each.times for each in found if each is not None]
    if len(times) < len(found):
        kept: list[float] | None = read_json(run.stage(name).times) if run.stage(name).times.exists() else None
        return kept
    return times[0] if times and all(each == times[0] for each in times) else None


@dataclass(frozen=True)
class Solving:
    """A pairs stage, with all that its paths depend on."""

    teacher: LoadedTeacher
    stage: PairsStage
    seed: int
    device: torch.device
    real: Real | None = None
    data_digest: str | None = None

    @classmethod
    def of_run(
        cls, run: RunPaths, spec: RunSpec, name: str, device: torch.device, *, indexed: bool = False
    ) -> "Solving":
        """Of the stage `name` of a run, whose teacher is there. indexed: as of `data.load`."""
        stage = spec.stages[name]
        assert isinstance(stage, PairsStage)
        found = teacher(run, spec, stage.teacher, device)
        assert found is not None, "workflow.check lets no such stage through"
        of_data = stage.paths in pairspec.OF_DATA
        store = run.root.parent
        folder = run.root if indexed else store
        data = datasets.load(spec.data, spec.seed, folder, indexed=indexed) if of_data else None
        law = teacher(run, spec, None, torch.device("cpu")) if of_data and data is None else None
        stage = schedules.with_times(stage, found, store, device)
        return cls.of(found, stage, seed=key(spec.seed, name), device=device, data=data, law=law)

    @classmethod
    def of(
        cls,
        teacher: LoadedTeacher,
        stage: PairsStage,
        *,
        seed: int,
        device: torch.device,
        data: DataSet | None,
        law: LoadedTeacher | None,
    ) -> "Solving":
        """data, or a law in closed form: of paths that begin with data."""
        if stage.paths not in pairspec.OF_DATA:
            return cls(teacher, stage, seed, device)
        if data is not None:
            check_shapes(teacher, data)
        return cls(teacher, stage, seed, device, *paths.of_data(data, law, seed=seed, block=stage.block))

    def generate(self, folder: Path, progress: Progress, stop: StopRequest, part: tuple[int, int] | None) -> None:
        """`pairs.generate`."""
        pairs.generate(
            self.teacher,
            self.stage,
            folder,
            seed=self.seed,
            device=self.device,
            progress=progress,
            stop=stop,
            part=part,
            real=self.real,
            data_digest=self.data_digest,
        )

    def accuracy(self) -> Accuracy:
        """What the solver's number of steps is worth, by the first pairs."""
        planned = pairs.plan(self.teacher, self.stage, self.seed, self.data_digest)
        field = self.teacher.guided(self.stage.guidance_scale)
        return accuracy.measure(field, planned, self.real, self.device, StopRequest())
