"""Fitted solvers in the store, and what they are used for: to sample a teacher, or a student with its weights.

How they are fitted is in `students.fitting`.
"""

from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from distill.core import records
from distill.core.errors import InputError
from distill.core.field_types import LINE, FrozenModel
from distill.core.text import one_line
from distill.exchange.student_card import StudentCard, refuse_rows
from distill.flow import solvers
from distill.flow.fields import start
from distill.networks.velocity import VelocityStudent
from distill.protocols import Cond, VelocityField
from distill.spec.kinds import per_velocity
from distill.spec.model import is_path
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.samplers import bns
from distill.students.sampling import Method, padded
from distill.teachers import LoadedTeacher


class FittedSolver(FrozenModel):
    """A solver fitted to one network. Stored as a JSON file in STORE/fitted."""

    format: Literal[1] = 1
    digest: str
    """digest of the network"""
    steps: int
    guidance_scale: float
    samples: int
    """number of pairs that it was fitted to"""
    seed: int
    times: list[float]
    """the N + 1 times on the linear path, from 1 to 0; 1 stands for the field's noisiest time"""
    rows: list[list[float]]
    """row i: a_i, b_i0, ..., b_ii"""
    rms: float
    """root mean square error of the samples from other noises"""
    rms_before: float
    """the same for ab2"""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if len(self.times) != self.steps + 1 or not is_path(self.times):
            raise ValueError(f"times: {self.steps + 1} times that decrease from 1 to 0 are expected")
        refuse_rows(self.rows, self.steps)
        return self


def path(store: Path, digest: str, steps: int, guidance_scale: float) -> Path:
    """The file of the solver that is fitted to a network for so many steps."""
    return store / "fitted" / f"{digest[:32]}-{steps}-{guidance_scale:g}.json"


def load(store: Path, digest: str, steps: int, guidance_scale: float = 1.0) -> FittedSolver | None:
    """The fitted solver that the store has for a network; None if it has none. InputError if its file is damaged."""
    file = path(store, digest, steps, guidance_scale)
    try:
        found = records.load(file, FITTED, "delete it, and fit the solver again: distill schedule TEACHER --fit")
    except FileNotFoundError:
        return None
    return found if (found.digest, found.steps, found.guidance_scale) == (digest, steps, guidance_scale) else None


FITTED: records.Schema[FittedSolver] = records.Schema(FittedSolver)


def method(teacher: LoadedTeacher, fitted: FittedSolver) -> Method:
    """Sampling of a teacher with a solver that was fitted to it."""
    return of_field(velocity(teacher, fitted.guidance_scale), fitted)


def of_field(field: VelocityField, fitted: FittedSolver) -> Method:
    """Sampling of the velocity field on the linear path to which the solver was fitted."""

    def generate(noise: Tensor, cond: Cond, fresh: object) -> Tensor:
        return solve(field, noise, cond, fitted)

    return Method(generate, per_velocity(fitted.guidance_scale) * fitted.steps)


def velocity(teacher: LoadedTeacher, guidance_scale: float) -> VelocityField:
    """The velocity that a solver is fitted to: on the linear path, and called like a student's."""
    return solvers.on_linear_path(teacher_on_linear_path(teacher).guided(guidance_scale))


def solve(field: VelocityField, noise: Tensor, cond: Cond, fitted: FittedSolver) -> Tensor:
    """The samples [B, ...] from noise [B, ...], without gradients. field: on the linear path."""
    times = torch.tensor([field.t_range[1], *fitted.times[1:]], dtype=torch.float64)
    with torch.no_grad():
        return bns.sample(field, start(field, noise), times, cond, padded(fitted.rows))


def refuse_student(teacher: LoadedTeacher, guidance_scale: float) -> None:
    """InputError if there can be no student for a fitted solver: it needs a network, and one call per step."""
    if guidance_scale != 1:
        raise InputError(
            f"--guidance-scale {guidance_scale:g}: a student calls its network once per step, but guidance takes two "
            "calls; leave out --out, or use --guidance-scale 1"
        )
    if teacher.network is None:
        raise InputError(f"--out: {teacher.description} has no network to export; leave it out")


def student(teacher: LoadedTeacher, fitted: FittedSolver, name: str) -> tuple[VelocityStudent, StudentCard]:
    """The teacher's network as a student that is sampled with a fitted solver. No weight was trained.

    InputError if its network cannot be exported.
    """
    refuse_student(teacher, fitted.guidance_scale)
    init = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher)
    found = init.velocity_field()
    assert isinstance(found, VelocityStudent)
    card = StudentCard(
        name=name,
        recipe="bns",
        summary="A fitted solver (BNS, Shaul et al. 2024, arXiv 2403.01329); the weights are the teacher's.",
        spec_digest="",
        teacher_digest=teacher.digest,
        teacher=one_line(teacher.description, LINE),
        license=teacher.license,
        kind="velocity",
        sampler=bns.SAMPLER,
        t_grids={fitted.steps: fitted.times},
        fitted={fitted.steps: fitted.rows},
        num_classes=init.num_classes if init.has_classes else None,
        null_class=init.null_class,
        unconditional=teacher.unconditional,
        shape=init.shape,
        guidance_scale=teacher.guidance_scale,
        weights="raw",
        images=0,
        metrics={f"rms@{fitted.steps}": float(f"{fitted.rms:.6g}")},
    )
    return found, card
