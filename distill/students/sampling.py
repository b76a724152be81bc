"""Sampling of teachers and students, in blocks. The noise of a sample depends on (seed, index) alone."""

import importlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from distill.core.errors import InputError, RunError
from distill.exchange import step_numbers
from distill.flow.dopri5 import solve_adaptive
from distill.flow.draws import key, sample_labels, sample_noise
from distill.flow.solvers import grid_of, solve, solve_along
from distill.flow.times import uniform_grid
from distill.networks.velocity import VelocityStudent
from distill.protocols import Cond, ForSteps, Gridded, Recipe, VelocityField
from distill.solvers import find_solver
from distill.spec.guidancespec import UNCHANGED, FieldSettings
from distill.spec.kinds import SAMPLERS, about_calls, network_calls, per_velocity
from distill.students import native
from distill.students.loaded import LoadedStudent, Student
from distill.teachers import LoadedTeacher

# (noise [B, ...], its condition, further noises of the same shape) -> samples [B, ...]
Generate = Callable[[Tensor, Cond, Sequence[Tensor]], Tensor]


@runtime_checkable
class SamplerModule(Protocol):
    """Interface of a module in `samplers/`; its `__init__.py` describes the members."""

    SAMPLER: str

    def num_fresh(self, steps: int) -> int: ...

    @property
    def sample(self) -> Callable[..., Tensor]: ...


def _module(sampler: str) -> SamplerModule:
    module: Any = importlib.import_module(f"distill.students.samplers.{sampler}")
    return module


MODULES = {name: _module(name) for name in SAMPLERS}
OF_NETWORK = {"euler", "renoise"}  # samplers whose usual times depend on the schedule of the network


@dataclass(frozen=True)
class Method:
    """A way to make samples, and its cost."""

    generate: Generate
    nfe: int  # network evaluations per sample, those of guidance included; if `counted`, an estimate
    fresh: int = 0  # number of noises in addition to the first one
    counted: Callable[[Tensor, Cond], tuple[Tensor, Tensor]] | None = None
    """instead of `generate`, if the number of calls differs: returns samples and network evaluations of each, [B]"""


@dataclass(frozen=True)
class Block:
    """Consecutive samples."""

    samples: Tensor  # [n, ...] on the CPU, not clamped
    seconds: float  # per sample
    calls: Tensor | None = None  # network evaluations of each, [n], if they differ


def of_teacher(
    teacher: LoadedTeacher,
    solver: str,
    steps: int,
    settings: FieldSettings,
    times: Sequence[float] | None = None,
    tolerance: float | None = None,
) -> Method:
    """Sample the teacher with a solver. See `of_field`."""
    return of_field(teacher.field_with(settings), solver, steps, times, settings, tolerance)


def of_field(
    field: VelocityField,
    solver: str,
    steps: int,
    times: Sequence[float] | None = None,
    settings: FieldSettings = UNCHANGED,
    tolerance: float | None = None,
) -> Method:
    """Sample a velocity field with a solver of its ODE or SDE, in uniform steps or along `times` (see `solve_along`).

    settings: those of the field, to count its calls. tolerance: of dopri5, which ignores `steps`.
    """
    if tolerance is not None:
        assert not settings.varies, "checks.check lets no such stage through"
        return _adaptive(field, tolerance, per_velocity(settings.guidance_scale))
    noises = find_solver(solver).noises

    def generate(noise: Tensor, cond: Cond, fresh: Sequence[Tensor]) -> Tensor:
        if times is not None:
            return solve_along(field, noise, cond, solver=solver, times=times)
        return solve(field, noise, cond, solver=solver, steps=steps, fresh=fresh)

    nfe = settings.network_calls(solver, grid_of(field, steps, times))
    return Method(generate, nfe, noises(steps) if noises else 0)


def _adaptive(field: VelocityField, tolerance: float, calls: int) -> Method:
    def counted(noise: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        samples, made = solve_adaptive(field, noise, cond, tolerance=tolerance)
        return samples, calls * made

    return Method(lambda noise, cond, _: counted(noise, cond)[0], calls * about_calls(tolerance), counted=counted)


def of_student(student: LoadedStudent, t_grid: Tensor) -> Method:
    """Sample a student along `t_grid` [N + 1] with the sampler named in its folder."""
    steps = len(t_grid) - 1

    fitted = weights(student.fitted, steps)

    def generate(noise: Tensor, cond: Cond, fresh: Sequence[Tensor]) -> Tensor:
        return by_sampler(student.student, student.sampler, noise, t_grid, cond, [*fresh, *fitted])

    return Method(generate, network_calls(student.sampler, steps), num_fresh(student.sampler, steps))


def own_grids(recipe: Recipe, times: Sequence[float] | None) -> dict[int, list[float]]:
    """The times of a recipe's student by number of steps; empty if it has none of its own.

    times: those of the states in the recipe's pairs, if known.
    """
    given = recipe.t_grids(times) if isinstance(recipe, Gridded) else {}
    return {steps: list(grid) for steps, grid in given.items()}


def trained_steps(recipe: Recipe, t_grids: Mapping[int, Sequence[float]]) -> list[int]:
    """The numbers of steps for which a recipe trains its student; empty if it aims at none in particular.

    InputError if they are invalid, or if `t_grids` has no times for one.
    """
    given = recipe.trained_steps if isinstance(recipe, ForSteps) else None
    numbers = [] if given is None else [given] if isinstance(given, int) else list(given)
    if not all(type(each) is int and each > 0 for each in numbers):
        raise InputError(f"the recipe's trained_steps: {given} given; valid: whole numbers above 0, or None")
    try:
        step_numbers.refuse_trained(numbers, t_grids)
    except ValueError as error:
        raise InputError(f"the recipe's {error}") from error
    return numbers


def times_of(student: LoadedStudent, steps: int) -> Tensor:
    """The times [steps + 1] of a student: its own, or those for its kind of network. InputError for other `steps`."""
    return grid(student.t_grids, steps) if student.t_grids else usual_grid(student.student, student.sampler, steps)


def usual_grid(student: Student, sampler: str, steps: int) -> Tensor:
    """The times [steps + 1] of a student whose recipe defines none: uniform ones, or see `LinearCall.t_grid`."""
    return native.call_of(student).t_grid(steps) if uses_table(student, sampler) else uniform_grid(steps)


def uses_table(student: Student, sampler: str) -> bool:
    """Whether the usual times of a student are those of a VP schedule."""
    if sampler not in OF_NETWORK or not native.is_native(student.network):
        return False
    return native.call_of(student).table is not None


def grid(t_grids: Mapping[int, Sequence[float]], steps: int) -> Tensor:
    """The times [steps + 1] of a student: its own, or uniform ones if it has none. InputError for other `steps`."""
    if not t_grids:
        return uniform_grid(steps)
    refuse_steps(t_grids, [steps], "steps")
    return torch.tensor(t_grids[steps], dtype=torch.float64)


def refuse_other_times(student: LoadedStudent, where: str) -> None:
    """InputError if a student cannot be sampled at other times than its own.

    That needs a velocity field without `t_grids`: other students are trained for certain pairs of times t and s.
    """
    refuse_times(student.t_grids, where)
    if not isinstance(student.student, VelocityStudent):
        raise InputError(
            f"{where}: this student is not a velocity field, so it supports only uniform steps; remove this option"
        )


def refuse_times(t_grids: Mapping[int, Sequence[float]], where: str) -> None:
    """InputError if a student has step times of its own, so that no others can be given."""
    if t_grids:
        raise InputError(f"{where}: this student supports only its own step times; remove this option")


def refuse_steps(t_grids: Mapping[int, Sequence[float]], asked: Sequence[int], where: str) -> None:
    """InputError if a student has times of its own, but not for one of the numbers of steps `asked`."""
    wrong = [steps for steps in asked if t_grids and steps not in t_grids]
    if wrong:
        made = step_numbers.in_words(t_grids)
        raise InputError(
            f"{where}: this student supports only {made}, not {wrong[0]}, because it was made for the times of these "
            "steps alone"
        )


@torch.no_grad()
def by_sampler(
    student: Student,
    sampler: str,
    noise: Tensor,
    t_grid: Tensor,
    cond: Cond,
    more: Sequence[Tensor],
) -> Tensor:
    """Run the sampler of that name along `t_grid` [N + 1].

    If the first time is less than 1, x at that time is the noise, scaled to the variance that x_t has there for data of
    unit variance.

    more: `num_fresh` noises like `noise` [B, ...], and `weights` if the sampler is fitted.
    """
    assert sampler in MODULES, f"there is no sampler '{sampler}'"
    if (first := t_grid[0].item()) < 1:
        noise = noise * math.hypot(1 - first, first)
    return MODULES[sampler].sample(student, noise, t_grid, cond, *more)


def weights(fitted: Mapping[int, list[list[float]]], steps: int) -> list[Tensor]:
    """The weights of a fitted sampler for this number of steps, as one tensor [N, N + 1]; none for other samplers."""
    return [padded(fitted[steps])] if fitted else []


def padded(rows: list[list[float]]) -> Tensor:
    """Rows of 2, 3, ..., N + 1 numbers as one tensor [N, N + 1] float64, filled up with zeros."""
    filled = [[*row, *[0.0] * (len(rows) + 1 - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.float64)


def num_fresh(sampler: str, steps: int) -> int:
    """How many noises a sampler takes in addition to the first one."""
    return MODULES[sampler].num_fresh(steps)


def fresh_noises(seed: int, indices: Sequence[int], shape: tuple[int, ...], count: int) -> list[Tensor]:
    """`count` noises [len(indices), *shape] on the CPU. Noise k of sample i depends on (seed, i, k) alone."""
    return [sample_noise(key(seed, "renoise", k), indices, shape) for k in range(count)]


def blocks(
    method: Method,
    like: LoadedTeacher | LoadedStudent,
    *,
    seed: int,
    count: int,
    block: int,
    device: torch.device,
    conditions: Sequence[int] | None = None,
    numbers: Iterable[int] | None = None,
) -> Iterator[Block]:
    """Samples 0 to count - 1, `block` at a time, in the shape and with the conditions of `like`.

    conditions: numbers of conditions that samples use in turn; None: all. numbers: of the blocks; None: all.

    The last block is filled up with further samples, which are dropped: the values of a sample must not depend on
    `count`. RunError if a sample is not finite.
    """
    for start in range(0, count, block) if numbers is None else (number * block for number in numbers):
        indices = range(start, start + block)
        noise = sample_noise(seed, indices, like.shape).to(device)
        fresh = [each.to(device) for each in fresh_noises(seed, indices, like.shape, method.fresh)]
        cond = condition(like, indices, device, conditions)
        _wait(device)
        before = time.perf_counter()
        calls: Tensor | None = None
        if method.counted is not None:
            samples, calls = method.counted(noise, cond)
        else:
            samples = method.generate(noise, cond, fresh)
        _wait(device)
        seconds = (time.perf_counter() - before) / block
        samples = samples[: count - start].cpu()
        if not samples.isfinite().all():
            bad = start + int((~samples.isfinite()).flatten(1).any(1).nonzero()[0])
            raise RunError(f"sample {bad} of {like.description} contains values that are not finite")
        yield Block(samples, seconds, None if calls is None else calls[: count - start].cpu())


def condition(
    network: LoadedTeacher | LoadedStudent,
    indices: Sequence[int],
    device: torch.device,
    conditions: Sequence[int] | None = None,
) -> Cond:
    """The conditions of the samples `indices`; empty for an unconditional network.

    conditions: numbers of conditions that samples use in turn; None: all.
    """
    conditioning = network.conditioning
    if conditioning.count is None:
        return {}
    if conditions is None:
        labels = sample_labels(indices, conditioning.count)
    else:
        labels = torch.tensor([conditions[i % len(conditions)] for i in indices])
    return conditioning.collate(labels.to(device))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
