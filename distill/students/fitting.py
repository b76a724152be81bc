"""Fitted solvers: a few numbers per step, fitted to one network (BNS, Shaul et al. 2024, arXiv 2403.01329).

With noise x_0 at t_0 = 1 and velocities v_j = v(x_j, t_j), step i computes

    x_{i+1} = a_i x_0 + sum over j <= i of b_ij v_j,

and x_N is the sample. The times t_1 to t_{N-1} and the weights a, b are N (N + 5) / 2 - 1 numbers. They include every
solver with N calls, among them those of `distill.solvers` with one call per step. They are fitted to pairs of noise and
the end of its path, computed with many Heun steps; only x_N is compared, so the states in between leave the path.

The fit begins at uniform times with the weights of `least_squares`, or with those of ab2 if these are better. For
networks the loss is the mean over pairs of ln(||x_N - data||^2 / d) and the optimizer is Adam. In less than `FEW`
dimensions, the error of a single pair can be almost 0 and its logarithm unbounded: there the loss is ln of the mean
over all pairs, and the optimizer is L-BFGS. The weights with the smallest root mean square (RMS) error on pairs that
are not fitted are kept.

Deviations from the paper: fewer pairs and steps; where the fit begins; the logarithm of the mean in few dimensions; the
time t of the linear path from 1 (noise) to 0.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.core.atomic import write_atomic
from distill.core.errors import InputError, RunError
from distill.core.stop import StopRequest
from distill.flow import solvers
from distill.flow.draws import key, sample_noise
from distill.flow.fields import start
from distill.flow.interpolants import linear
from distill.flow.times import uniform_grid
from distill.protocols import Cond, VelocityField
from distill.runs.progress import Progress
from distill.students.fitted import FittedSolver, load, path, velocity
from distill.students.samplers import bns
from distill.students.sampling import condition
from distill.teachers import LoadedTeacher

PER_NUMBER, LEAST = 20, 512  # pairs per fitted number; pairs in few dimensions, where they are cheap
HELD_OUT = 0.25  # further pairs, on which the fit is judged, as a fraction of those
REFERENCE = ("heun", 64)  # solver and number of steps of the pairs
FEW = 64  # dimensions
STEPS, RATE, RATE_OF_TIMES = 70, 5e-3, 2e-2  # of Adam
EVALUATIONS = 1500  # of L-BFGS
BLOCK = 64  # pairs in one network call
TINY = 1e-30  # smallest mean square error whose logarithm is taken

ShowDone = Callable[[int, int], None]  # is called with the number of steps done, and their total
Judge = Callable[[], None]


def numbers(steps: int) -> int:
    """How many numbers are fitted for so many steps."""
    return steps * (steps + 5) // 2 - 1


@dataclass(frozen=True)
class SolvedPaths:
    """The states of paths along N steps, and their conditions, on the device."""

    cond: Cond
    states: Tensor  # [N + 1, n, ...], at uniform times; [2, n, ...]: only the ends

    @property
    def starts(self) -> Tensor:
        return self.states[0]

    @property
    def ends(self) -> Tensor:
        return self.states[-1]

    def blocks(self) -> Iterator["SolvedPaths"]:
        for first in range(0, len(self.starts), BLOCK):
            rows = slice(first, first + BLOCK)
            yield SolvedPaths({name: value[rows] for name, value in self.cond.items()}, self.states[:, rows])


def least_squares(field: VelocityField, paths: SolvedPaths, times: Sequence[float]) -> Tensor:
    """Rows [N, N + 1] with which each state is as close to the path as its step allows, for given times [N + 1].

    Step after step, the weights of x_i and of v_0, ..., v_i are those with the least squares of x_{i+1} - path.
    """
    steps, x = len(times) - 1, paths.starts
    velocities: list[Tensor] = []
    row = torch.eye(steps + 1, dtype=torch.float64)[0]  # of x_i
    rows = []
    for i in range(steps):
        with torch.no_grad():
            parts = [field(b.starts, b.starts.new_full((len(b.starts),), times[i]), b.cond)
                     for b in SolvedPaths(paths.cond, x[None]).blocks()]  # fmt: skip
        velocities.append(torch.cat(parts))
        own, *rest = _weights([x, *velocities], paths.states[i + 1])
        row = own * row
        row[1 : i + 2] += torch.tensor(rest, dtype=torch.float64)
        rows.append(row)
        x = own * x + sum(weight * v for weight, v in zip(rest, velocities, strict=True))
    return torch.stack(rows)


def _weights(basis: Sequence[Tensor], goal: Tensor) -> list[float]:
    """The weights w_k with the least squares of sum_k w_k basis_k - goal; basis_k and goal are [n, ...]."""
    gram, right = torch.zeros(len(basis), len(basis)).double(), torch.zeros(len(basis), 1).double()
    for first in range(0, len(goal), BLOCK):
        rows = slice(first, first + BLOCK)
        part = torch.stack([each[rows] for each in basis]).double().flatten(1)  # [K, m]
        gram += (part @ part.T).cpu()
        right += (part @ goal[rows].double().flatten()[:, None]).cpu()
    found: list[float] = torch.linalg.lstsq(gram, right, driver="gelsd").solution[:, 0].tolist()
    return found


class FittedNumbers:
    """The numbers that are fitted: the logarithms of the step lengths, up to a constant, and the weights."""

    def __init__(self, steps: int, field: VelocityField, device: torch.device) -> None:
        low, self.high = field.t_range
        self.span = self.high - low
        uniform = uniform_grid(steps, self.high, low)
        lengths = (uniform[:-1] - torch.cat([uniform[1:-1], uniform.new_tensor([low])])).clamp(min=1e-6 * self.span)
        self.lengths = lengths.log().to(device).requires_grad_()
        self.weights = rows_of("ab2", uniform, field.t_range).to(device).requires_grad_()
        self.mask = torch.ones(steps, steps + 1, device=device).tril(1).double()

    @property
    def times(self) -> Tensor:
        """t_0 to t_N [N + 1], from the field's noisiest time to 0; no call is below its lowest time."""
        inner = self.high - self.span * torch.softmax(self.lengths, 0).cumsum(0)[:-1]
        return torch.cat([inner.new_tensor([self.high]), inner, inner.new_zeros(1)])

    @property
    def rows(self) -> Tensor:
        """The weights [N, N + 1]."""
        return self.weights * self.mask

    def end(self, field: VelocityField, x: Tensor, cond: Cond) -> Tensor:
        """What `bns.sample` returns, with gradients. The memory is that of one call: the others are recomputed."""
        times, rows, first, velocities = self.times, self.rows, x, list[Tensor]()
        for i in range(len(rows)):
            t = times[i].expand(len(x))
            velocities.append(checkpoint(field, x, t, cond, use_reentrant=False))
            x = rows[i, 0] * first + sum(rows[i, j + 1] * v for j, v in enumerate(velocities))
        return x


@dataclass(frozen=True)
class Judged:
    """Fitted numbers with their error on the held-out pairs."""

    rms: float
    times: Tensor  # [N + 1]
    rows: Tensor  # [N, N + 1]


class _Basis:
    """A field whose j-th call returns the unit vector of v_j, so that a solver's states are its rows of weights."""

    interpolant = linear()

    def __init__(self, steps: int, t_range: tuple[float, float]) -> None:
        self.units, self.calls, self.t_range = torch.eye(steps + 1, dtype=torch.float64), 0, t_range

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.calls += 1
        return self.units[self.calls :][:1]


def rows_of(solver: str, t_grid: Tensor, t_range: tuple[float, float]) -> Tensor:
    """The rows [N, N + 1] of a solver with one call per step, along t_grid [N + 1]."""
    basis = _Basis(len(t_grid) - 1, t_range)
    return torch.cat(list(solvers.states(solver, basis, basis.units[:1], t_grid, {})))


def default_samples(teacher: LoadedTeacher, steps: int) -> int:
    """Number of pairs to fit so many steps to."""
    return max(PER_NUMBER * numbers(steps), LEAST if math.prod(teacher.shape) < FEW else 1)


def fit(
    teacher: LoadedTeacher,
    steps: int,
    *,
    device: torch.device,
    samples: int | None = None,
    seed: int = 0,
    guidance_scale: float = 1.0,
    show: ShowDone = lambda done, total: None,
) -> FittedSolver:
    """Fit a solver of `steps` steps to a teacher.

    samples: number of pairs to fit; None: 20 for each number. A quarter as many are held out.
    show: may raise an error to end the fit.

    InputError if the teacher's network cannot be called on the linear path; RunError if a number is not finite.
    """
    field = velocity(teacher, guidance_scale)
    count = samples or default_samples(teacher, steps)
    solve = partial(_paths, teacher, field, steps, seed, device)
    pairs, others = solve(range(count)), solve(range(count, count + max(16, int(HELD_OUT * count))))
    others = SolvedPaths(others.cond, others.states[[0, -1]])
    if not (pairs.states.isfinite().all() and others.states.isfinite().all()):
        raise RunError(f"the samples of {teacher.description} contain NaN or infinity; no solver was fitted")
    kept = minimize(field, pairs, others, FittedNumbers(steps, field, device), show)
    first, best = kept[0], kept[-1]
    return FittedSolver(
        digest=teacher.digest,
        steps=steps,
        guidance_scale=guidance_scale,
        samples=count,
        seed=seed,
        times=[1.0, *best.times[1:].tolist()],
        rows=[row[: i + 2] for i, row in enumerate(best.rows.tolist())],
        rms=best.rms,
        rms_before=first.rms,
    )


def minimize(
    field: VelocityField,
    pairs: SolvedPaths,
    held_out: SolvedPaths,
    numbers: FittedNumbers,
    show: ShowDone,
) -> list[Judged]:
    """Fit the numbers to the pairs. Returns the first ones, and those that improved on the held-out pairs, in order."""
    kept: list[Judged] = []

    def judge() -> None:
        times, rows = numbers.times.detach().clone(), numbers.rows.detach().clone()
        rms = _rms(field, held_out, times, rows)
        if not kept or rms < kept[-1].rms:
            kept.append(Judged(rms, times, rows))

    judge()
    before, ab2 = kept[0].rms, numbers.weights.detach().clone()
    numbers.weights.data = least_squares(field, pairs, numbers.times.tolist()).to(ab2)
    judge()
    if not kept[-1].rms < before:
        numbers.weights.data = ab2
    few = pairs.ends[0].numel() < FEW
    (_by_lbfgs if few else _by_adam)(field, pairs, numbers, judge, show)
    return kept


def _paths(
    teacher: LoadedTeacher, field: VelocityField, steps: int, seed: int, device: torch.device, indices: range
) -> SolvedPaths:
    """The paths of these samples, by many steps of the reference solver."""
    noise = sample_noise(key(seed, "bns"), indices, teacher.shape).to(device)  # not those of evaluations
    cond = condition(teacher, indices, device)
    if teacher.network is None:
        noise = noise.double()
    name, fine = REFERENCE
    each = -(-fine // steps)  # steps of the reference solver in one of ours
    t_grid, parts = uniform_grid(each * steps, field.t_range[1], field.t_range[0]), []
    for block in SolvedPaths(cond, start(field, noise)[None]).blocks():
        with torch.no_grad():
            states = [block.starts, *solvers.states(name, field, block.starts, t_grid, block.cond)]
        parts.append(torch.stack(states[::each]))
    return SolvedPaths(cond, torch.cat(parts, dim=1))


def _rms(field: VelocityField, pairs: SolvedPaths, times: Tensor, rows: Tensor) -> float:
    total = 0.0
    with torch.no_grad():
        for each in pairs.blocks():
            made = bns.sample(field, each.starts, times, each.cond, rows)
            total += (made - each.ends).double().square().sum().item()
    return math.sqrt(total / pairs.ends.numel())


def _by_adam(
    field: VelocityField,
    pairs: SolvedPaths,
    found: FittedNumbers,
    judge: Judge,
    show: ShowDone,
) -> None:
    groups = [{"params": [found.weights], "lr": RATE}, {"params": [found.lengths], "lr": RATE_OF_TIMES}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        for each in pairs.blocks():
            errors = (found.end(field, each.starts, each.cond) - each.ends).double().square().flatten(1).mean(1)
            (errors.clamp(min=TINY).log().sum() / len(pairs.ends)).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 5 == 0:
            judge()
        show(step + 1, STEPS)


def _by_lbfgs(
    field: VelocityField,
    pairs: SolvedPaths,
    found: FittedNumbers,
    judge: Judge,
    show: ShowDone,
) -> None:
    rounds = 15  # the held-out pairs are looked at after each
    optimizer = torch.optim.LBFGS(
        [found.lengths, found.weights],
        max_iter=EVALUATIONS,
        max_eval=EVALUATIONS // rounds,
        history_size=50,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = (found.end(field, pairs.starts, pairs.cond) - pairs.ends).double().square().mean().log()
        total.backward()
        return total

    before = math.inf
    for done in range(rounds):
        now = optimizer.step(loss).item()
        judge()
        show(done + 1, rounds)
        if not now < before - 1e-4:  # `now` is the loss at the beginning of the round
            break
        before = now


def find(
    teacher: LoadedTeacher,
    store: Path,
    steps: int,
    *,
    device: torch.device,
    samples: int | None = None,
    seed: int | None = None,
    guidance_scale: float = 1.0,
    stop: StopRequest | None = None,
) -> FittedSolver:
    """The solver of the store for this network and number of steps; if it has none, one is fitted now and stored.

    samples, seed: of the pairs to fit it to. If given, a solver that was fitted to others is replaced. If several
    processes fit at the same time without these, the first result is stored, and all return it. Raises like `fit`, and
    InputError for a store that cannot be written.
    """
    asked = samples is not None or seed is not None
    count, own = samples or default_samples(teacher, steps), seed or 0
    found = load(store, teacher.digest, steps, guidance_scale)
    if found is not None and (not asked or (found.samples, found.seed) == (count, own)):
        return found
    file = path(store, teacher.digest, steps, guidance_scale)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot save the fitted solver in {file.parent}: {error.strerror}; use another store (--store)"
        ) from error
    with Progress(f"fit {steps} steps", 100, "percent", None) as progress:

        def show(done: int, total: int) -> None:
            progress.update(100 * done // total, {})
            if stop is not None:
                stop.raise_if_requested("nothing, since a solver was being fitted")

        found = fit(
            teacher, steps, device=device, samples=count, seed=own, guidance_scale=guidance_scale, show=show
        )  # fmt: skip
    write_atomic(file, found.model_dump_json(indent=1), replace=asked)
    return found if asked else load(store, teacher.digest, steps, guidance_scale) or found
