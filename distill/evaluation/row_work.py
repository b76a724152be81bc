"""Measures the rows of an evaluation: the samples that a network makes, block by block.

A finished row is kept in a file, with a key of everything that its values depend on. So a process that is killed loses
only one row. The values do not depend on the number of ranks: a block is made as a whole by one of them, and what is
seen of the blocks is added up in their order.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from distill.core.atomic import write_atomic, write_json
from distill.core.records import read_json
from distill.core.stop import StopRequest
from distill.evaluation import decoded, order, shared_rows
from distill.evaluation.judging import Judges
from distill.evaluation.metrics.reference import Reference
from distill.evaluation.order import PromptOrder
from distill.evaluation.pictures import REPORT_PIXELS, columns_for, images_png, scatter_png
from distill.evaluation.row_plans import Plan, fine_plan, shortest
from distill.evaluation.tally import RowSums, SeenBlock
from distill.flow import dopri5
from distill.flow.draws import sample_noise
from distill.flow.solvers import straightness
from distill.flow.times import uniform_grid
from distill.networks.velocity import VelocityStudent
from distill.protocols import VelocityField
from distill.runs.progress import Progress
from distill.runs.results import Row
from distill.spec.kinds import per_velocity
from distill.spec.model import EvaluateStage
from distill.students import fitted
from distill.students.loaded import LoadedStudent
from distill.students.sampling import Block, Method, blocks, condition, of_field, of_student, of_teacher
from distill.teachers import LoadedTeacher
from distill.training.world import ALONE, World

VERSION = 2  # of the measurements; part of the key of a row
PICTURE_ROWS, PICTURE_POINTS = 6, 2000
STRAIGHTNESS_STEPS, STRAIGHTNESS_SAMPLES = 16, 256


@dataclass(frozen=True)
class RowWork:
    """Measures the rows of an evaluation. Ranks make the blocks of samples in turn; rank 0 adds up what they saw."""

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
    world: World = ALONE
    straight: dict[tuple[str, str], float | None] = field(default_factory=dict)  # cached, by role and network

    @property
    def _layout(self) -> tuple[int, int]:
        """Columns and lines of a picture of images."""
        if self.order is not None:
            return self.order.columns, order.LINES
        return columns_for(10 * PICTURE_ROWS, self.teacher.num_classes), PICTURE_ROWS

    @property
    def endpoints(self) -> Path:
        """Folder of the samples of the fine solver, a file for each block, which are kept until all rows are done."""
        return self.folder / "endpoints"

    def rows(self, plans: Sequence[Plan]) -> list[Row]:
        """The rows, on rank 0; an empty list on the others. All ranks must call it."""
        kept = [row for plan in plans if (row := self.kept(plan))] if self.world.first else []
        if self._said_by_first("rows that are kept", len(kept) == len(plans)):
            return kept
        fine = self._fine()
        found = [fine if plan == fine_plan(self.stage) else self._row(plan) for plan in plans]
        return [row for row in found if row is not None]

    def _fine(self) -> Row | None:
        """The row of the teacher with the fine solver. Its samples are written, unless an earlier process did."""
        plan = fine_plan(self.stage)
        kept = self.kept(plan) if self.world.first else None
        missing = not all(self._has_endpoint(number) for number in self._own_blocks)
        (missing,) = self.world.meet("samples of the fine solver", missing)
        if self._said_by_first("row of the fine solver", kept is not None and not missing):
            self._skip()
            return kept
        return self._measured(plan, is_fine=True)

    def _row(self, plan: Plan) -> Row | None:
        """A row, measured now or by an earlier process."""
        found = (self.kept(plan) or self._shared(plan)) if self.world.first else None
        if self._said_by_first(f"row {plan.slug}", found is not None):
            self._skip()
            return found
        return self._measured(plan)

    def _said_by_first(self, what: str, flag: bool) -> bool:
        """The flag of rank 0, for all ranks."""
        return self.world.meet(what, self.world.first and flag)[0]

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

    @property
    def _own_blocks(self) -> range:
        """The numbers of the blocks of samples that this rank makes."""
        return range(self.world.rank, -(-self.stage.samples // self.stage.block), self.world.size)

    def _endpoint(self, number: int) -> Path:
        return self.endpoints / f"{number:06}.safetensors"

    def _has_endpoint(self, number: int) -> bool:
        """Whether the samples of the fine solver of a block are there."""
        with suppress(OSError, SafetensorError), safe_open(self._endpoint(number), framework="pt") as file:
            return bool(file.metadata() == {"key": self._key(fine_plan(self.stage))})
        return False

    def _seen_blocks(self, plan: Plan, *, is_fine: bool) -> Iterator[SeenBlock]:
        """What is seen of this rank's blocks of the samples of a row. is_fine: they are kept for the other rows."""
        network, block = self._network(plan), self.stage.block
        # A fitted student has weights for certain numbers of steps only.
        few = self._method(plan if isinstance(network, LoadedStudent) and network.fitted else shortest(plan))
        for _ in blocks(few, network, seed=self.seed, count=1, block=block, device=self.device):
            pass  # warm-up: allocations and the choice of kernels are not part of the measured time
        made = blocks(
            self._method(plan), network, seed=self.seed, count=self.stage.samples, block=block, device=self.device,
            conditions=self.order.numbers if self.order else None, numbers=self._own_blocks,
        )  # fmt: skip
        for number, each in zip(self._own_blocks, made, strict=True):
            yield self._seen(number, each, is_fine=is_fine)

    def _seen(self, number: int, made: Block, *, is_fine: bool) -> SeenBlock:
        samples, start = made.samples, number * self.stage.block
        if is_fine:
            write_atomic(self._endpoint(number), save({"samples": samples}, {"key": self._key(fine_plan(self.stage))}))
            error = 0.0
        else:
            endpoint = load_file(self._endpoint(number))["samples"]
            error = (samples.double() - endpoint.double()).square().sum().item()
        found = decoded.seen(
            samples, start, self.teacher.codec, self.reference, self.judges, self._shown(samples), self.device
        )
        noise = sample_noise(self.seed, range(start, start + len(samples)), self.teacher.shape)
        return SeenBlock(
            count=len(samples),
            numbers=samples.numel(),
            shown=found.shown,
            features=found.features,
            judged=found.judged,
            squared_error=error,
            squared_path=(samples - noise).double().square().sum().item(),
            seconds=made.seconds * len(samples),
            calls=made.calls,
        )

    def _shown(self, samples: Tensor) -> int:
        """How many samples of a row are shown."""
        columns, lines = self._layout
        return PICTURE_POINTS if samples.ndim == 2 else columns * lines

    def _measured(self, plan: Plan, *, is_fine: bool = False) -> Row | None:
        """Make the samples of a row and measure them. None on all ranks but rank 0."""
        if is_fine:
            self.endpoints.mkdir(exist_ok=True)
        tally, before = self._tally(), self.progress.done
        seen = self._seen_blocks(plan, is_fine=is_fine)
        for turn in range(-(-self.stage.samples // (self.stage.block * self.world.size))):
            place = f"row {plan.slug}, turn {turn}"
            for each in self.world.gather(place, next(seen, None)):
                if each is not None:
                    tally.add(each)
            self.progress.update(before + tally.count, {})
            self.stop.share(*self.world.meet(place, self.stop.signal is not None))
            self.stop.raise_if_requested("the finished rows of the evaluation")
        return self._summary(plan, tally) if self.world.first else None

    def _tally(self) -> RowSums:
        if not self.world.first:
            return RowSums(self.stage.samples)
        reference, judges = self.reference, self.judges
        return RowSums(
            self.stage.samples,
            None if reference is None else reference.sums.like(),
            1 if judges is None else len(judges.texts),
            {} if judges is None else {name: each.sums.like() for name, each in judges.references.items()},
        )

    def _summary(self, plan: Plan, tally: RowSums) -> Row:
        calls = torch.cat(tally.calls) if tally.calls else None
        steps, nfe, most = self._cost(plan, calls)
        laws = {} if self.reference is None or tally.features is None else self.reference.measure(tally.features)
        picture = self._picture_name(plan)
        write_atomic(self.folder / picture, self._picture(torch.cat(tally.shown), self._layout[0]))
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
            metrics=self.judges.summary(tally) if self.judges else {},
            groups=self.judges.by_group(tally) if self.judges else {},
            rms=math.sqrt(tally.squared_error / tally.numbers),
            images_per_second=tally.count / tally.seconds,
            straightness=self._straightness(plan) if plan.guidance_scale is None else None,
            transport=tally.squared_path / tally.numbers,
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
