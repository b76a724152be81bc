"""Measures the samples that teacher and students make from the same noise.

The samples of a row are made once and used for all its columns. A finished row is kept in a file, with a key of
everything that its values depend on. So a process that is killed loses only one row.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from distill.core.atomic import write_atomic, write_json
from distill.core.errors import InputError
from distill.core.records import read_json
from distill.core.stop import StopRequest
from distill.data import DataSet
from distill.data.encoded import scaled_for
from distill.evaluation import compatible, decoded, judging, order, row_plans, shared_rows
from distill.evaluation.judging import Judges
from distill.evaluation.metrics.reference import Reference, of_exact, of_images, pixels_of
from distill.evaluation.order import PromptOrder
from distill.evaluation.pictures import REPORT_PIXELS, columns_for, images_png, scatter_png
from distill.evaluation.row_plans import Plan, fine_plan, shortest
from distill.flow import dopri5
from distill.flow.draws import sample_noise
from distill.flow.solvers import straightness
from distill.flow.times import uniform_grid
from distill.networks.velocity import VelocityStudent
from distill.protocols import VelocityField
from distill.runs.progress import Progress
from distill.runs.results import FILE_NAME, Results, Row
from distill.runs.run_store import RunPaths
from distill.spec.kinds import per_velocity
from distill.spec.model import EvaluateStage, TeacherSpec
from distill.students import fitted, loaded
from distill.students.loaded import LoadedStudent
from distill.students.sampling import (
    Block,
    Method,
    blocks,
    condition,
    of_field,
    of_student,
    of_teacher,
)
from distill.teachers import LoadedTeacher

VERSION = 2  # of the measurements; part of the key of a row
PICTURE_ROWS, PICTURE_POINTS = 6, 2000
STRAIGHTNESS_STEPS, STRAIGHTNESS_SAMPLES = 16, 256


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
) -> Results:
    """Run the evaluate stage `name` of a run; writes results.json and pictures to its folder. See `measure`.

    own: a teacher in closed form, whose exact samples are used in place of data. like: see `load_student`.
    prompts: see `measure`.
    """
    if teacher is None:
        raise InputError(f"stages.{name}.teacher is not given and the spec has no teacher; name a train stage")
    students = {each: loaded.load_student(run.student(each), device, like, teacher) for each in stage.students}
    exact = teacher.exact_data or (own.exact_data if own else None)
    return measure(
        run.stage(name).root, name, stage, teacher, students, data,
        seed=seed, device=device, progress=progress, stop=stop, store=run.root.parent, exact=exact, prompts=prompts,
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
) -> Results:
    """Measure every row of `stage`; writes results.json, rows and pictures to `folder`. Finished rows are reused.

    Without data, samples are compared with exact ones. InputError if the networks or the data do not fit together.

    store: folder with step times, fitted solvers, and rows of teachers for other evaluations.
    exact: (seed, indices) -> exact samples; None: the teacher's, if it is known in closed form.
    prompts: of the teacher's conditions, for the stage's metrics; None: only their captions are known.
    """
    compatible.check(stage, teacher, students, data)
    pixels = None if data is None else pixels_of(scaled_for(data, teacher.codec), teacher.codec, device)
    judges, used = judging.of_stage(stage, teacher, pixels, prompts, device, stop, folder)
    try:
        for part in ("rows", "pictures"):
            (folder / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"results cannot be written to {folder}: {error.strerror}; name another folder") from error
    exact = exact or teacher.exact_data
    if data is not None:
        reference = None if pixels is None else of_images(pixels, folder)
    else:
        reference = of_exact(exact, stage.samples, seed) if exact is not None else None
    work = _Work(folder, stage, teacher, students, reference, judges, used, seed, device, progress, stop, store)
    plans = row_plans.plans(stage, teacher, students, store, device)
    rows = [row for plan in plans if (row := work.kept(plan))]
    if len(rows) < len(plans):
        fine, endpoint = work.fine()
        rows = [fine if plan == fine_plan(stage) else work.row(plan, endpoint) for plan in plans]
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
    work.endpoint_path.unlink(missing_ok=True)
    return results


@dataclass(frozen=True)
class _Work:
    folder: Path
    stage: EvaluateStage
    teacher: LoadedTeacher
    students: Mapping[str, LoadedStudent]
    reference: Reference | None
    judges: Judges | None
    order: PromptOrder | None
    seed: int
    device: torch.device
    progress: Progress
    stop: StopRequest
    store: Path
    straight: dict[tuple[str, str], float | None] = field(default_factory=dict)  # cached, by role and network

    @property
    def _layout(self) -> tuple[int, int]:
        """Columns and lines of a picture of images."""
        if self.order is not None:
            return self.order.columns, order.LINES
        return columns_for(10 * PICTURE_ROWS, self.teacher.num_classes), PICTURE_ROWS

    @property
    def endpoint_path(self) -> Path:
        return self.folder / "endpoint.safetensors"

    def fine(self) -> tuple[Row, Tensor]:
        """The teacher's row with the fine solver, and its samples [N, ...], which are kept until all rows are done."""
        plan, path = fine_plan(self.stage), self.endpoint_path
        kept, stamp = self.kept(plan), {"key": self._key(plan)}
        if kept is not None and path.exists():
            with safetensors.safe_open(path, framework="pt") as file:
                if file.metadata() == stamp:
                    self._skip()
                    return kept, load_file(path)["samples"]
        made = self._samples(plan)
        write_atomic(path, save({"samples": made.samples}, metadata=stamp))
        return self._measure(plan, made, made.samples), made.samples

    def row(self, plan: Plan, endpoint: Tensor) -> Row:
        """A row, measured now or by an earlier process. endpoint: samples of the fine solver."""
        kept = self.kept(plan)
        if kept is None:
            kept = self._shared(plan)
        if kept is None:
            return self._measure(plan, self._samples(plan), endpoint)
        self._skip()
        return kept

    def _skip(self) -> None:
        self.progress.start(self.progress.done + self.stage.samples)

    def _network(self, plan: Plan) -> LoadedTeacher | LoadedStudent:
        return self.teacher if plan.role == "teacher" else self.students[plan.network]

    def _method(self, plan: Plan) -> Method:
        """How the samples of a row are made."""
        if plan.fit is not None:
            return fitted.method(self.teacher, plan.fit)
        if plan.role == "teacher":
            settings = self.stage.settings_at(plan.guidance_scale)
            return of_teacher(self.teacher, plan.solver, plan.steps, settings, plan.times, plan.tolerance)
        student = self.students[plan.network]
        if plan.fine:
            return of_field(student.student, plan.solver, plan.steps, tolerance=plan.tolerance)
        given = uniform_grid(plan.steps) if plan.times is None else torch.tensor(plan.times, dtype=torch.float64)
        return of_student(student, given)

    def _samples(self, plan: Plan) -> Block:
        """All samples of a row, and the mean seconds per sample."""
        network, block = self._network(plan), self.stage.block
        # A fitted student has weights for certain numbers of steps only.
        few = self._method(plan if isinstance(network, LoadedStudent) and network.fitted else shortest(plan))
        for _ in blocks(few, network, seed=self.seed, count=1, block=block, device=self.device):
            pass  # warm-up: allocations and the choice of kernels are not part of the measured time
        method, before = self._method(plan), self.progress.done
        found, seconds, calls = [], 0.0, []
        used = self.order.numbers if self.order else None
        for made in blocks(
            method, network, seed=self.seed, count=self.stage.samples, block=block, device=self.device, conditions=used
        ):
            found.append(made.samples)
            calls += [] if made.calls is None else [made.calls]
            seconds += made.seconds * len(made.samples)
            self.progress.update(before + sum(map(len, found)), {})
            self.stop.raise_if_requested("the finished rows of the evaluation")
        return Block(torch.cat(found), seconds / self.stage.samples, torch.cat(calls) if calls else None)

    def _measure(self, plan: Plan, made: Block, endpoint: Tensor) -> Row:
        samples, (steps, nfe, most) = made.samples, self._cost(plan, made.calls)
        columns, lines = self._layout
        count = PICTURE_POINTS if samples.ndim == 2 else columns * lines
        found = decoded.seen(samples, self.teacher.codec, self.reference, self.judges, count, self.device)
        laws = self.reference.measure(found.features) if self.reference and found.features is not None else {}
        picture = self._picture_name(plan)
        write_atomic(self.folder / picture, self._picture(found.first, columns))
        row = Row(
            network=plan.network,
            role=plan.role,
            solver=plan.solver,
            steps=steps,
            fine=plan.fine,
            along=plan.along,
            guidance_scale=plan.guidance_scale,
            nfe=nfe,
            most_calls=most,
            distance=laws.get("distance"),
            kid=laws.get("kid"),
            precision=laws.get("precision"),
            recall=laws.get("recall"),
            metrics=self.judges.summary(found.judged) if self.judges else {},
            groups=self.judges.by_group(found.judged) if self.judges else {},
            rms=(samples.double() - endpoint.double()).square().mean().sqrt().item(),
            images_per_second=1 / made.seconds,
            straightness=self._straightness(plan) if plan.guidance_scale is None else None,
            transport=self._transport(samples),
            picture=picture,
        )
        write_json(self._path(plan), {"key": self._key(plan), "row": row.model_dump(mode="json")})
        if plan.is_shared:
            shared_rows.share(self.store, self.device, self._key(plan), row, (self.folder / picture).read_bytes())
        return row

    def _shared(self, plan: Plan) -> Row | None:
        """The row of the teacher that another evaluation measured under the same conditions; None if there is none."""
        if not plan.is_shared or (found := shared_rows.find(self.store, self.device, self._key(plan))) is None:
            return None
        if found.row.picture != self._picture_name(plan):
            return None
        write_atomic(self.folder / found.row.picture, found.picture)
        write_json(self._path(plan), {"key": self._key(plan), "row": found.row.model_dump(mode="json")})
        return found.row

    def _cost(self, plan: Plan, calls: Tensor | None) -> tuple[int, int, int | None]:
        """Steps and network calls per sample, rounded up if they are means, and then also the most calls."""
        if calls is None:
            return plan.steps, self._method(plan).nfe, None
        mean = calls.double().mean().item()
        per = per_velocity(self.stage.settings_at(plan.guidance_scale).guidance_scale)
        tries = (mean / (per if plan.role == "teacher" else 1) - 1) / dopri5.CALLS
        return math.ceil(tries), math.ceil(mean), int(calls.max())

    def _transport(self, samples: Tensor) -> float:
        """E || sample - noise ||^2 / d, with the noise from which each sample was made."""
        total = 0.0
        for start in range(0, len(samples), self.stage.block):
            part = samples[start : start + self.stage.block]
            noise = sample_noise(self.seed, range(start, start + len(part)), self.teacher.shape)
            total += (part - noise).double().square().sum().item()
        return total / samples.numel()

    def _straightness(self, plan: Plan) -> float | None:
        """Straightness of the network's own paths, by a fixed number of Euler steps from the first noises.

        It is computed once for each network. It is None for flow maps, since not every recipe trains u(x_t, t, t); for
        velocities that are trained for fewer steps; and for paths of constant acceleration, which are curved by design.
        """
        name = (plan.role, plan.network)
        if name not in self.straight:
            velocity = self._velocity(self._network(plan))
            self.straight[name] = None if velocity is None else self._straightness_of(velocity, self._network(plan))
        return self.straight[name]

    def _velocity(self, network: LoadedTeacher | LoadedStudent) -> VelocityField | None:
        if isinstance(network, LoadedTeacher):
            return network.field_with(self.stage.field_settings)
        fits = not network.t_grids or STRAIGHTNESS_STEPS in network.t_grids
        return network.student if fits and isinstance(network.student, VelocityStudent) else None

    def _straightness_of(self, velocity: VelocityField, network: LoadedTeacher | LoadedStudent) -> float:
        count, total = min(STRAIGHTNESS_SAMPLES, self.stage.samples), 0.0
        for start in range(0, count, self.stage.block):
            indices = range(start, min(start + self.stage.block, count))
            noise = sample_noise(self.seed, indices, network.shape).to(self.device)
            cond = condition(network, indices, self.device, self.order.numbers if self.order else None)
            total += len(indices) * straightness(velocity, noise, cond, STRAIGHTNESS_STEPS)
        return total / count

    def _picture(self, first: Tensor, columns: int) -> bytes:
        if first.ndim == 2:
            return scatter_png(first, self.reference.points if self.reference else None)
        return images_png(first, columns, REPORT_PIXELS)

    def _picture_name(self, plan: Plan) -> str:
        return f"pictures/{plan.slug}.png"

    def _path(self, plan: Plan) -> Path:
        return self.folder / "rows" / f"{plan.slug}.json"

    def _key(self, plan: Plan) -> str:
        """A digest of everything that the values of a row depend on."""
        stage, reference = self.stage, self.reference
        facts = [VERSION, stage.samples, stage.block, self.seed, self.device.type, stage.guidance_scale, repr(plan)]
        facts += [self.teacher.digest, self._network(plan).digest, repr(fine_plan(stage))]
        facts += [digest] if (digest := self.teacher.codec.digest) else []
        facts += [reference.identity if reference else None]
        facts += [plan.fit.model_dump_json()] if plan.fit is not None else []
        facts += [identity] if (identity := self.teacher.identity_of(stage.field_settings)) else []
        facts += [self.judges.identity] if self.judges else []
        facts += [f"guidance {plan.guidance_scale}"] if plan.guidance_scale is not None else []
        facts += [digest] if self.order and (digest := self.order.digest) else []
        facts += [stage.fine_tolerance] if stage.fine_tolerance is not None else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def kept(self, plan: Plan) -> Row | None:
        """The row of an earlier process; None if there is none, or if it was measured under other conditions."""
        path = self._path(plan)
        if not path.exists():
            return None
        kept = read_json(path)
        return Row.model_validate(kept["row"]) if kept["key"] == self._key(plan) else None
