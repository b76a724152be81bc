"""Step times with the least total error, by dynamic programming (BOSS, Nguyen et al. 2023, arXiv 2312.16414).

The ODE of a velocity field is solved on a fine uniform grid of M steps, from n noises. The cost of one long step from
time t_i to t_j is its squared distance from the fine path: c(i, j) = mean over samples of || step(x_i; t_i -> t_j) -
x_j ||^2, summed over the elements, and 0 for j = i + 1. The K steps with the least total cost follow from

    W_1(i) = c(i, M),    W_k(i) = min over j > i of c(i, j) + W_{k-1}(j),

where W_k(i) is the least cost from t_i to the end in k steps. This total is a sum of local errors: it ignores how an
error grows in later steps.

Steps are those of the chosen solver. An Euler step, x_i + (t_j - t_i) v_i, needs no further network call. Heun calls
the network for every (i, j): n M^2 / 2 calls in all. A step of a multistep solver also depends on the steps before it,
which W does not know. They are assumed to have the same length: they start at the indices 2 i - j, 3 i - 2 j, ..., or
at 0 instead of negative ones. A corrector improves the fine path, but not the long steps whose error is measured.

The costs of another criterion, which depends on no solver, are in `ays`.

Deviations from the paper: other solvers than Euler; times on the linear path, whatever the field's own schedule.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import ValidationError, model_validator
from torch import Tensor

from distill.core import printing, records
from distill.core.atomic import write_atomic
from distill.core.errors import InputError, RunError
from distill.core.field_types import FrozenModel
from distill.core.regular_files import read_regular
from distill.core.text import suggest
from distill.flow import solvers
from distill.flow.draws import sample_noise
from distill.flow.fields import start
from distill.flow.times import uniform_grid
from distill.networks.velocity import VelocityStudent
from distill.protocols import Cond, VelocityField
from distill.solvers import Step, find_solver
from distill.spec.guidancespec import UNCHANGED, FieldSettings
from distill.spec.kinds import either, ode_solvers
from distill.spec.model import FINE, SAMPLES, SEED, PairsStage
from distill.students import ays
from distill.students.loaded import LoadedStudent
from distill.students.sampling import condition
from distill.teachers import LoadedTeacher

MEMORY = 2**29  # bytes of states in memory at once, about
MAX_BYTES = 2**30  # largest file that is read: enough for ten thousand fine steps
CRITERIA = ("error", "ays")


@dataclass(frozen=True)
class Choice:
    """Step times chosen from a fine grid."""

    indices: list[int]  # positions in the fine grid, from 0 to M
    times: list[float]  # on the linear path, from 1 down; 1 stands for the field's noisiest time
    cost: float  # sum over the steps


@dataclass(frozen=True)
class CostsAsked:
    """The network and the settings for which costs are measured; fields as in `Costs`."""

    digest: str
    solver: str
    fine: int
    samples: int
    seed: int
    guidance_scale: float
    changes: str = ""
    criterion: str = "error"

    @property
    def file_name(self) -> str:
        """The name of its file. Files of older versions, which have no changes and no other criterion, are found."""
        facts = [1, self.digest, self.solver, self.fine, self.samples, self.seed, self.guidance_scale]
        facts += [self.changes] if self.changes else []
        key = json.dumps(facts if self.criterion == "error" else [*facts, self.criterion])
        return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


class Costs(FrozenModel):
    """The cost of a step between any two times of a fine grid. Stored as a JSON file in STORE/schedules."""

    format: Literal[1] = 1
    digest: str
    """digest of the network"""
    solver: str
    fine: int
    """number of steps of the fine grid, M"""
    samples: int
    seed: int
    guidance_scale: float
    changes: str = ""
    """other settings of the network's field, from `LoadedTeacher.identity_of`"""
    criterion: Literal["error", "ays"] = "error"
    """error: that of a step of `solver`; ays: see `distill.students.ays`"""
    t_grid: list[float]
    """the M + 1 times on the linear path, decreasing"""
    costs: list[list[float]]
    """row i: costs of the steps from i to i + 1, ..., M"""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        times = self.t_grid
        falls = all(a > b for a, b in pairwise(times)) and all(0 <= t <= 1 for t in times)
        if len(times) != self.fine + 1 or not falls:
            raise ValueError(
                f"t_grid: {len(times)} times; valid: {self.fine + 1}, decreasing from at most 1 to at least 0"
            )
        if [len(row) for row in self.costs] != list(range(self.fine, 0, -1)):
            raise ValueError(f"costs: its rows are not those of {self.fine} steps")
        if not all(math.isfinite(cost) and cost >= 0 for row in self.costs for cost in row):
            raise ValueError("costs: valid are finite numbers of at least 0")
        return self

    @property
    def asked(self) -> CostsAsked:
        return CostsAsked(
            self.digest,
            self.solver,
            self.fine,
            self.samples,
            self.seed,
            self.guidance_scale,
            self.changes,
            self.criterion,
        )

    @property
    def matrix(self) -> Tensor:
        """c(i, j) [M + 1, M + 1] float64, infinite for j <= i."""
        rows = [torch.tensor([torch.inf] * (i + 1) + row, dtype=torch.float64) for i, row in enumerate(self.costs)]
        return torch.stack([*rows, torch.full((self.fine + 1,), torch.inf, dtype=torch.float64)])

    def best(self, steps: int) -> Choice:
        """The `steps` steps with the least total cost, or uniform ones if no others cost less.

        InputError unless 1 <= steps <= M.
        """
        if not 1 <= steps <= self.fine:
            raise InputError(f"{steps} steps cannot be chosen from a grid of {self.fine} steps; give 1 to {self.fine}")
        found, uniform = self._choice(least(self.matrix, steps)), self.uniform(steps)
        return found if found.cost < uniform.cost else uniform

    def uniform(self, steps: int) -> Choice:
        """`steps` steps of equal length, up to the resolution of the fine grid."""
        return self._choice([(2 * k * self.fine + steps) // (2 * steps) for k in range(steps + 1)])

    def _choice(self, indices: list[int]) -> Choice:
        cost = sum(self.costs[i][j - i - 1] for i, j in zip(indices[:-1], indices[1:], strict=True))
        return Choice(indices, [1.0, *(self.t_grid[i] for i in indices[1:])], cost)


def least(costs: Tensor, steps: int) -> list[int]:
    """Indices, from 0 to M, of the `steps` steps with the least total cost. costs: as `Costs.matrix`."""
    summed, chosen = costs[:, -1], []  # W_1
    for _ in range(steps - 1):
        summed, best = (costs + summed).min(dim=1)  # W_k(i) and the j that attains it
        chosen.append(best)
    indices = [0]
    for best in reversed(chosen):
        indices.append(int(best[indices[-1]]))
    return [*indices, len(costs) - 1]


def measure(field: VelocityField, noise: Tensor, cond: Cond, *, solver: str, fine: int) -> tuple[list[float], Tensor]:
    """The M + 1 times of the fine grid, and the costs [M + 1, M + 1] on the field's paths from noise [n, ...]."""
    field = solvers.on_linear_path(field)
    t_grid = uniform_grid(fine, field.t_range[1], field.t_range[0])
    costs = torch.full((fine + 1, fine + 1), torch.inf, dtype=torch.float64, device=noise.device)
    with torch.no_grad():
        states, step = _path(field, start(field, noise), cond, solver, t_grid)
        for i in range(fine):
            costs[i, i + 1] = 0
            for j in range(i + 2, fine + 1):
                costs[i, j] = (step(i, j) - states[j]).double().square().flatten(1).sum(1).mean()
    return t_grid.tolist(), costs.cpu()


StepFunction = Callable[[int, int], Tensor]  # (i, j) -> the state after one step from state i to time j


def _path(
    field: VelocityField, x: Tensor, cond: Cond, solver: str, t_grid: Tensor
) -> tuple[list[Tensor], StepFunction]:
    """The M + 1 states of the fine path, and a function that makes one solver step from any of them."""
    found, ode = find_solver(solver), solvers.FieldOde(field, cond)
    times, states, seen = t_grid.tolist(), [x], list[Tensor]()
    to_data = ode.path(times[-1])[1] == 0

    def place(i: int, j: int) -> Step:
        earlier = dict.fromkeys(max(i - n * (j - i), 0) for n in range(1, found.memory + 1))  # of steps as long as this
        past = [(seen[k], times[k]) for k in earlier if k < i]
        left = 1 + math.ceil((len(times) - 1 - j) / (j - i))  # this step, and later ones of the same length
        return Step(times[i], times[j], past, left, to_data, times)

    def step(i: int, j: int) -> Tensor:
        return found.step(ode, states[i], seen[i], place(i, j))

    for i, t in enumerate(times[:-1]):
        seen.append(found.look(ode, states[i], t))
        if found.correct is not None and i > 0:
            states[i] = found.correct(ode, states[i - 1], seen[i - 1], place(i - 1, i), seen[i])
        states.append(step(i, i + 1))
    return states, step


def find(
    network: LoadedTeacher | LoadedStudent,
    store: Path,
    *,
    device: torch.device,
    criterion: str = "error",
    solver: str = "euler",
    fine: int = FINE,
    samples: int = SAMPLES,
    seed: int = SEED,
    settings: FieldSettings = UNCHANGED,
) -> Costs:
    """A network's costs, from the store if they are there; otherwise they are measured now and stored.

    criterion: one of CRITERIA; "ays" does not depend on the solver, which must be "euler".
    If several processes measure at the same time, the first result is stored, and all return it. InputError for an
    unknown criterion, an unknown or stochastic solver, or a store that cannot be written; RunError if a cost is not
    finite.
    """
    if criterion not in CRITERIA:
        raise InputError(f"unknown criterion '{criterion}': {suggest(criterion, CRITERIA)}")
    if find_solver(solver).noises is not None:
        raise InputError(
            f"solver '{solver}' draws noise, so its steps have no error on a given path; use {either(ode_solvers())}"
        )
    if criterion == "ays" and solver != "euler":
        raise InputError(
            f"solver {solver}: no effect with the criterion ays, whose times do not depend on a solver; remove one of "
            "the two"
        )
    changes = network.identity_of(settings) if isinstance(network, LoadedTeacher) else ""
    asked = CostsAsked(network.digest, solver, fine, samples, seed, settings.guidance_scale, changes, criterion)
    path = store / "schedules" / asked.file_name
    try:
        return _kept(path, asked)
    except (FileNotFoundError, NotADirectoryError):
        damaged = False
    except (OSError, ValueError) as error:
        reason = records.mistake(error) if isinstance(error, ValidationError) else error
        printing.warn(f"{path} does not contain the requested step times ({reason}); they are computed again")
        damaged = True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot save step times in {path.parent}: {error.strerror}; use another store (--store)"
        ) from error
    found = _measured(network, settings, asked, device)
    write_atomic(path, found.model_dump_json(), replace=damaged)
    with suppress(OSError, ValueError):  # the file may be another process's, which was first
        return _kept(path, asked)
    return found


def _kept(path: Path, asked: CostsAsked) -> Costs:
    """The costs stored in a file. OSError if it cannot be read, ValueError if it is invalid or does not fit `asked`."""
    costs = Costs.model_validate_json(read_regular(path, MAX_BYTES), strict=True)
    if costs.asked != asked:
        raise ValueError("it was computed for another network, or with other settings")
    return costs


def optimal_times(
    network: LoadedTeacher | LoadedStudent,
    store: Path,
    steps: int,
    device: torch.device,
    settings: FieldSettings = UNCHANGED,
) -> list[float]:
    """The times of the best `steps` Euler steps, with the default fine grid and number of samples."""
    return find(network, store, device=device, settings=settings).best(steps).times


def with_times(stage: PairsStage, teacher: LoadedTeacher, store: Path, device: torch.device) -> PairsStage:
    """The stage with its `optimal_times` replaced by times: the best ones for Euler steps, which students take."""
    if stage.optimal_times is None:
        return stage
    costs = find(teacher, store, device=device, fine=stage.steps, settings=stage.field_settings)
    times = [1 - i / stage.steps for i in costs.best(stage.optimal_times).indices]
    return stage.model_copy(update={"times": times, "optimal_times": None})


def _measured(
    network: LoadedTeacher | LoadedStudent, settings: FieldSettings, facts: CostsAsked, device: torch.device
) -> Costs:
    if isinstance(network, LoadedTeacher):
        field: VelocityField = network.field_with(settings)
    else:
        assert isinstance(network.student, VelocityStudent) and settings == UNCHANGED
        field = network.student
    elements = torch.Size(network.shape).numel()
    block = max(1, MEMORY // (2 * 4 * (facts.fine + 1) * elements))
    total = torch.zeros(facts.fine + 1, facts.fine + 1, dtype=torch.float64)
    times: Sequence[float] = []
    for first in range(0, facts.samples, block):
        indices = range(first, min(first + block, facts.samples))
        noise, cond = sample_noise(facts.seed, indices, network.shape).to(device), condition(network, indices, device)
        if facts.criterion == "ays":
            data = _samples(network, field, noise, cond, indices, facts)
            times, costs = ays.measure(field, data, cond, seed=facts.seed, indices=indices, fine=facts.fine)
        else:
            times, costs = measure(field, noise, cond, solver=facts.solver, fine=facts.fine)
        total += costs * (len(indices) / facts.samples)
    for i in range(facts.fine):
        if not total[i, i + 1 :].isfinite().all():
            cost = "AYS cost of a step" if facts.criterion == "ays" else f"error of a step of {facts.solver}"
            raise RunError(
                f"the {cost} from t={times[i]:.4g} is NaN or infinity on the paths of {network.description}; nothing "
                "was saved"
            )
    rows = [[float(f"{c:.9g}") for c in total[i, i + 1 :].tolist()] for i in range(facts.fine)]
    return Costs.model_validate({**asdict(facts), "t_grid": list(times), "costs": rows})


def _samples(
    network: LoadedTeacher | LoadedStudent,
    field: VelocityField,
    noise: Tensor,
    cond: Cond,
    indices: Sequence[int],
    facts: CostsAsked,
) -> Tensor:
    """Samples of the field [n, ...]: exact ones if they are known, otherwise by as many steps as the fine grid has."""
    if (
        isinstance(network, LoadedTeacher)
        and network.exact_data is not None
        and not facts.changes
        and facts.guidance_scale == 1
    ):
        return network.exact_data(facts.seed, indices).to(noise)
    return solvers.solve(field, noise, cond, solver="ab3", steps=facts.fine)
