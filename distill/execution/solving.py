"""A pairs stage with everything that its paths depend on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from distill import pairs
from distill.core.errors import InputError
from distill.core.stop import StopRequest
from distill.data import DataSet
from distill.data.encoded import codec_of, scaled_for
from distill.execution.sources import Inputs, check_shapes
from distill.execution.work import Work
from distill.flow.codecs import PIXELS
from distill.pairs import Manifest, accuracy, choice, manifest, paths
from distill.pairs.choice import ChosenSolver
from distill.pairs.paths import Real
from distill.runs.progress import Progress
from distill.runs.run_store import RunPaths
from distill.spec.kinds import AUTO, FITTED
from distill.spec.model import OF_DATA, PairsStage
from distill.students import fitting, step_times
from distill.students.fitted import FittedSolver
from distill.teachers import LoadedTeacher


@dataclass(frozen=True)
class Solving:
    """A pairs stage with everything that its paths depend on."""

    teacher: LoadedTeacher
    stage: PairsStage
    seed: int
    device: torch.device
    real: Real | None = None
    data_digest: str | None = None

    store: Path = Path()
    """folder with step times and fitted solvers"""

    fit: FittedSolver | None = None
    """the fitted solver, if the stage uses one"""
    is_checked: bool = False
    """whether the accuracy of the solver is known"""

    @classmethod
    def of_run(cls, run: RunPaths, stage: PairsStage, inputs: Inputs, seed: int, device: torch.device) -> "Solving":
        """For a stage of a run. inputs: as returned by `load`."""
        assert inputs.teacher is not None, "checks.check lets no such stage through"
        store = run.root.parent
        return cls.of(inputs.teacher, stage, store, seed=seed, device=device, data=inputs.data, law=inputs.own)

    @classmethod
    def of(
        cls,
        teacher: LoadedTeacher,
        stage: PairsStage,
        store: Path,
        *,
        seed: int,
        device: torch.device,
        data: DataSet | None,
        law: LoadedTeacher | None,
    ) -> "Solving":
        """data, law: the data that paths start from, in pixels, or a teacher in closed form; for stages that need one.

        Step times that the stage asks for are taken from the store, or found now and stored.
        """
        stage = step_times.with_times(stage, teacher, store, device)
        if stage.paths not in OF_DATA:
            return cls(teacher, stage, seed, device, store=store)
        if data is not None:
            check_shapes(teacher, data)
            data = scaled_for(data, teacher.codec)
        if stage.dtype == "uint8" and not teacher.codec.is_identity:
            raise InputError(
                f"dtype: uint8 is for pixels, but the teacher ({teacher.description}) works on latents; valid: "
                "float32, float16, bfloat16"
            )
        codec = PIXELS if data is None else codec_of(data, teacher.codec)
        real = paths.of_data(data, law, seed=seed, block=stage.block, codec=codec, device=device)
        return cls(teacher, stage, seed, device, *real, store=store)

    def prepare(self, folder: Path, progress: Progress, stop: StopRequest) -> "Solving":
        """With the solver of `solver: auto`, or a fitted one: found once for all that make pairs in `folder`."""
        stage = self.stage
        if stage.solver == AUTO:
            chosen = self._chosen(folder, stop)
            progress.note(chosen.describe(stage.count))
            return replace(self, stage=stage.solved_by(chosen.solver, chosen.steps), is_checked=True)
        if stage.solver == FITTED:
            begun = manifest.read(folder)
            return replace(self, fit=self._fit(stop) if begun is None or begun.fitted is None else begun.fitted)
        return self

    def generate(self, folder: Path, progress: Progress, stop: StopRequest, part: tuple[int, int] | None) -> None:
        """Make the pairs, after `prepare`; see `pairs.generate`."""
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
            fit=self.fit,
            is_checked=self.is_checked,
        )

    def _fit(self, stop: StopRequest) -> FittedSolver:
        """The solver that is fitted to the teacher, from the store, or fitted now."""
        stage = self.stage
        return fitting.find(
            self.teacher, self.store, stage.steps, device=self.device, guidance_scale=stage.guidance_scale, stop=stop
        )

    def _chosen(self, folder: Path, stop: StopRequest) -> ChosenSolver:
        """The solver for `solver: auto`, chosen once for all processes that make the set in `folder`."""
        found = choice.kept(folder, self.stage, self.teacher)
        if found is None:
            choice.keep(folder, self._choose(stop))
            found = choice.kept(folder, self.stage, self.teacher)
        if found is None:
            raise InputError(
                f"{folder / choice.FILE} belongs to pairs with other settings; delete {folder}, or use another folder"
            )
        return found

    def _choose(self, stop: StopRequest) -> ChosenSolver:
        return choice.choose(self.teacher, self.stage, self._planned, self.real, self.device, stop)

    def _planned(self, stage: PairsStage) -> Manifest:
        return pairs.plan(self.teacher, stage, self.seed, self.data_digest)

    def accuracy(self) -> str:
        """Measure, on the first pairs, whether the solver is accurate enough; see `pairs.accuracy.measure`."""
        if self.stage.solver == AUTO:
            return self._choose(StopRequest()).describe(self.stage.count)
        if self.stage.solver == FITTED:
            fit = self._fit(StopRequest())
            return f"the samples of the fitted solver differ from exact ones by {fit.rms:.4g} (RMS, not relative)"
        field, planned = pairs.velocity(self.teacher, self.stage), self._planned(self.stage)
        return accuracy.measure(field, planned, self.real, self.device, StopRequest()).describe()


@contextmanager
def opened(work: Work, *, indexed: bool = True) -> Iterator[Solving]:
    """A context with a pairs stage and its loaded inputs. indexed: see `load_data`.

    Step times that the store does not have are found by rank 0; the other ranks take them from there.
    """
    stage = work.spec.stages[work.name]
    assert isinstance(stage, PairsStage)
    with work.inputs(indexed=indexed) as inputs:
        make = partial(Solving.of_run, work.run, stage, inputs, work.seed, work.device)
        yield work.world.alone("step times", make) or make()
