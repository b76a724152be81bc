"""A stage of a run, and the device and the ranks that compute it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from distill.core.stop import StopRequest
from distill.execution import sources
from distill.flow.draws import key
from distill.runs import cached
from distill.runs.progress import Progress
from distill.runs.run_store import RunPaths
from distill.spec.model import CheckpointTeacher, RunSpec, TeacherSpec
from distill.spec.resolved import Resolved
from distill.training.world import ALONE, World


@dataclass(frozen=True)
class Work:
    """A stage of a run, and the device and the ranks that compute it."""

    run: RunPaths
    resolved: Resolved
    name: str
    device: torch.device
    stop: StopRequest = field(default_factory=StopRequest)
    world: World = ALONE
    measure: bool = False
    part: tuple[int, int] | None = None

    @property
    def spec(self) -> RunSpec:
        return self.resolved.spec

    @property
    def own_part(self) -> tuple[int, int] | None:
        """(i, n): this rank makes the shards i, i + n, ... of a set; None: it makes all."""
        if self.world.size == 1:
            return self.part
        i, n = self.part or (0, 1)
        return i + n * self.world.rank, n * self.world.size

    @property
    def teacher(self) -> TeacherSpec | None:
        """The teacher of the spec, with the embeddings in the run's cache, if there are any."""
        return cached.with_conditions(self.spec, self.run).teacher

    @property
    def with_whole_teacher(self) -> "Work":
        """The same stage with the weights of the spec's teacher as they are stored, if they are quantised."""
        teacher = self.spec.teacher
        assert isinstance(teacher, CheckpointTeacher)
        whole = self.spec.model_copy(update={"teacher": teacher.model_copy(update={"quantize": None})})
        return replace(self, resolved=replace(self.resolved, spec=whole))

    @property
    def seed(self) -> int:
        """The seed of this stage: every stage has its own stream of random numbers."""
        return key(self.spec.seed, self.name)

    @contextmanager
    def inputs(self, device: torch.device | None = None, *, indexed: bool = True) -> Iterator[sources.Inputs]:
        """The inputs of the stage. device: where all weights of the teacher are loaded; None: the teacher is called on
        the stage's device, and may be larger than its memory. indexed: see `load_data`.
        """
        where, whole = device or self.device, device is not None
        with sources.opened(self.run, self.resolved, self.name, where, indexed=indexed, whole=whole) as inputs:
            yield inputs

    def progress(self, total: int, unit: str) -> Progress:
        return Progress(self.name, total, unit, self.run if self.world.first and self.part is None else None)
