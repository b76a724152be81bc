"""Measures the samples that teacher and students make from the same noise; see `row_work`."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.core.atomic import write_json
from distill.core.errors import InputError
from distill.core.stop import StopRequest
from distill.data import DataSet
from distill.data.encoded import scaled_for
from distill.data.source import Drawable
from distill.evaluation import compatible, judging, order, row_plans
from distill.evaluation.judging import Judges
from distill.evaluation.metrics.reference import Reference, of_exact, of_images, of_law, pixels_of
from distill.evaluation.order import PromptOrder
from distill.evaluation.row_plans import Plan
from distill.evaluation.row_work import RowWork
from distill.runs.progress import Progress
from distill.runs.results import FILE_NAME, Results
from distill.runs.run_store import RunPaths
from distill.spec.model import EvaluateStage, TeacherSpec
from distill.students import loaded
from distill.students.loaded import LoadedStudent
from distill.teachers import LoadedTeacher
from distill.training.world import ALONE, World


def evaluate(
    run: RunPaths,
    name: str,
    stage: EvaluateStage,
    teacher: LoadedTeacher | None,
    own: LoadedTeacher | None,
    data: DataSet | None,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
    stop: StopRequest,
    like: TeacherSpec | None = None,
    prompts: Sequence[str] | None = None,
    world: World = ALONE,
) -> Results | None:
    """Run the evaluate stage `name` of a run; writes results.json and pictures to its folder. See `measure`.

    own: a teacher in closed form, whose exact samples are used in place of data. like: see `load_student`.
    prompts, world: see `measure`.
    """
    if teacher is None:
        raise InputError(f"stages.{name}.teacher is not given and the spec has no teacher; name a train stage")
    students = {each: loaded.load_student(run.student(each), device, like, teacher) for each in stage.students}
    exact = teacher.exact_data or (own.exact_data if own else None)
    return measure(
        run.stage(name).root, name, stage, teacher, students, data,
        seed=seed, device=device, progress=progress, stop=stop, store=run.root.parent, exact=exact, prompts=prompts,
        world=world,
    )  # fmt: skip


def measure(
    folder: Path,
    name: str,
    stage: EvaluateStage,
    teacher: LoadedTeacher,
    students: Mapping[str, LoadedStudent],
    data: DataSet | None,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
    stop: StopRequest,
    store: Path,
    exact: Callable[[int, Sequence[int]], Tensor] | None = None,
    prompts: Sequence[str] | None = None,
    world: World = ALONE,
) -> Results | None:
    """Measure every row of `stage`; writes results.json, rows and pictures to `folder`. Finished rows are reused.

    Without data, or if its law is known, samples are compared with exact ones. InputError if the networks or the data
    do not fit together.

    store: folder with step times, fitted solvers, and rows of teachers for other evaluations.
    exact: (seed, indices) -> exact samples; None: the teacher's, if it is known in closed form.
    prompts: of the teacher's conditions, for the stage's metrics; None: only their captions are known.
    world: the ranks that make the samples together; all but rank 0 return None.
    """
    compatible.check(stage, teacher, students, data)
    pixels = None if data is None else pixels_of(scaled_for(data, teacher.codec), teacher.codec, device)
    exact = exact or teacher.exact_data

    def prepare() -> _Prepared:
        try:
            for part in ("rows", "pictures"):
                (folder / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"results cannot be written to {folder}: {error.strerror}; name another folder") from error
        judges, used = judging.of_stage(stage, teacher, pixels, prompts, device, stop, folder)
        reference = None
        if pixels is not None:
            reference = of_images(pixels, folder)
        elif isinstance(data, Drawable):
            reference = of_law(data, stage.samples, seed)
        elif data is None and exact is not None:
            reference = of_exact(exact, stage.samples, seed)
        return _Prepared(judges, used, reference, row_plans.plans(stage, teacher, students, store, device))

    # Rank 0 trains the network of features, and finds step times; the others read what it has kept.
    ready = world.alone("preparing the evaluation", prepare) or prepare()
    judges, used, reference = ready.judges, ready.order, ready.reference
    work = RowWork(
        folder, stage, teacher, students, reference, judges, used, seed, device, progress, stop, store, world
    )
    rows = work.rows(ready.plans)
    world.meet("rows of the evaluation")  # no rank reads the samples of the fine solver any more
    if not world.first:
        return None
    results = Results(
        stage=name,
        samples=stage.samples,
        seed=seed,
        block=stage.block,
        device=device.type,
        guidance_scale=stage.guidance_scale,
        guidance=stage.field_settings.more_words,
        distance=reference.name if reference else None,
        features=reference.network if reference else None,
        reference=len(reference.values) if reference else 0,
        floor=reference.floor if reference else None,
        vector=len(teacher.shape) == 1,
        latents=not teacher.codec.is_identity,
        real=judges.of_real() if judges else {},
        captions=used.first_texts(order.COLUMNS * order.LINES) if used else [],
        picture_columns=None if used is None else used.columns,
        real_picture=None if used is None or pixels is None else order.real_picture(folder, used, pixels),
        rows=rows,
    )
    write_json(folder / FILE_NAME, results.model_dump(mode="json"))
    if work.endpoints.exists():  # also those of a process that was killed after its last row
        shutil.rmtree(work.endpoints)
    return results


@dataclass(frozen=True)
class _Prepared:
    """What is known before samples are made."""

    judges: Judges | None
    order: PromptOrder | None
    reference: Reference | None
    plans: Sequence[Plan]
