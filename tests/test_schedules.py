"""Step times with the smallest summed error: compared with all possible choices, on paths with known costs."""

import dataclasses
import itertools
import json
import math
import os

import pytest
import torch

from distill.core.errors import InputError, RunError
from distill.flow import solvers
from distill.flow.draws import generator
from distill.flow.fields import Counted, Rescheduled
from distill.flow.interpolants import edm
from distill.flow.times import uniform_grid
from distill.spec import kinds
from distill.spec.guidancespec import UNCHANGED, FieldSettings
from distill.spec.model import GaussianTeacher, PairsStage
from distill.students import step_times
from distill.teachers.analytic import GaussianField, gaussian_teacher
from distill.testing import exact
from distill.testing.closed_form import class_gaussian_teacher

STD = math.sqrt(0.3)
UNIT = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)  # mean 0, mean square 1
SOLVERS = kinds.ode_solvers()
CPU = torch.device("cpu")


def gaussian(mean: float = 0.0, std: float = STD) -> GaussianField:
    return GaussianField(torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64))


def costs(solver: str = "euler", fine: int = 12, field=None, noise=UNIT) -> torch.Tensor:
    return step_times.measure(field or gaussian(), noise, {}, solver=solver, fine=fine)[1]


def summed(matrix: torch.Tensor, indices) -> float:
    return sum(matrix[i, j].item() for i, j in itertools.pairwise(indices))


def every(fine: int, steps: int):
    """All ways to go from 0 to fine in so many steps."""
    return [[0, *inner, fine] for inner in itertools.combinations(range(1, fine), steps - 1)]


def test_the_known_answer():  # T17
    matrix = costs()
    indices = step_times.least(matrix, 3)
    assert indices == [0, 6, 9, 12]
    assert summed(matrix, indices) == pytest.approx(0.0074214, abs=5e-8)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_euler_on_a_gaussian(steps):  # S07
    """With tan(theta) = (t/(1 - t))/STD, a step multiplies x/sqrt((1 - t)^2 STD^2 + t^2) by cos(difference of theta).

    So equal differences are best. Times found on a grid are almost as good.
    """
    grids = {"uniform": uniform_grid(steps)}
    theta = math.pi / 2 * (1 - torch.arange(1, steps, dtype=torch.float64) / steps)
    ratio = STD * theta.tan()
    grids["best"] = torch.cat([torch.ones(1), ratio / (1 + ratio), torch.zeros(1)])
    t_grid, matrix = step_times.measure(gaussian(), UNIT, {}, solver="euler", fine=96)
    grids["found"] = torch.tensor([t_grid[i] for i in step_times.least(matrix, steps)], dtype=torch.float64)
    stds = {name: solvers.integrate("euler", gaussian(), UNIT, grid, {})[0].item() for name, grid in grids.items()}
    angles = torch.atan2(grids["uniform"], (1 - grids["uniform"]) * STD)
    assert stds["uniform"] == pytest.approx(STD * angles.diff().cos().prod().item(), abs=1e-12)
    assert stds["best"] == pytest.approx(STD * math.cos(math.pi / (2 * steps)) ** steps, abs=1e-12)
    known = {1: (0, 0), 2: (0.230769, 0.273861), 4: (0.378445, 0.399045), 8: (0.457303, 0.468978)}
    assert (stds["uniform"], stds["best"]) == pytest.approx(known[steps], abs=1e-6)
    assert stds["found"] == pytest.approx(stds["best"], rel=0.005, abs=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_least_is_that_of_all_choices_and_falls_with_every_step(solver):  # T17
    fine = 9
    noise = torch.randn(5, 3, generator=generator("schedules"), dtype=torch.float64)
    matrix = costs(solver, fine, exact.FIELD, noise)
    found = []
    for steps in range(1, fine + 1):
        indices = step_times.least(matrix, steps)
        found.append(summed(matrix, indices))
        assert indices[0] == 0 and indices[-1] == fine and len(indices) == steps + 1
        assert found[-1] == pytest.approx(
            min(summed(matrix, each) for each in every(fine, steps)), rel=1e-12, abs=1e-15
        )
    assert all(a > b for a, b in itertools.pairwise(found))
    assert found[-1] == 0, "the fine path itself"


def test_a_cost_is_how_far_a_step_lands_from_the_path():
    """Of Euler by hand: the path of N(0, 0.3) scales its state, x_{i+1} = (1 + (t_{i+1} - t_i) g(t_i)) x_i."""
    t = uniform_grid(12).tolist()
    g = [(t_i - (1 - t_i) * 0.3) / ((1 - t_i) ** 2 * 0.3 + t_i**2) for t_i in t]
    x = list(itertools.accumulate(range(12), lambda x, i: x * (1 + (t[i + 1] - t[i]) * g[i]), initial=1.0))
    matrix = costs()
    for i, j in itertools.combinations(range(13), 2):
        assert matrix[i, j] == pytest.approx((x[i] * (1 + (t[j] - t[i]) * g[i]) - x[j]) ** 2, rel=1e-9, abs=1e-15)
    assert all(matrix[i, j].isinf() for i in range(13) for j in range(i + 1))
    both = gaussian(std=STD), torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    twice = costs(field=both[0], noise=both[1])
    assert twice[0, 12] == pytest.approx(5 * matrix[0, 12]), "the sum over elements, the mean over samples"


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_path_is_the_solvers(solver):
    noise, grid = torch.randn(5, 3, generator=generator("path"), dtype=torch.float64), uniform_grid(12)
    states, step = step_times._path(exact.FIELD, noise, {}, solver, grid)
    whole = solvers.solve(exact.FIELD, noise, {}, solver=solver, steps=12)
    assert torch.equal(states[-1], whole)
    along = solvers.states(solver, exact.FIELD, noise, grid, {})
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(states[1:], along, strict=True))
    first = solvers.integrate(solver, exact.FIELD, noise, grid[[0, 5]], {})
    assert (step(0, 5) - first).abs().max() < 1e-12


def test_a_multistep_takes_the_step_before_for_as_long():
    noise, grid = torch.randn(5, 3, generator=generator("path"), dtype=torch.float64), uniform_grid(12)
    states, step = step_times._path(exact.FIELD, noise, {}, "dpm_solver_pp_2m", grid)
    before = exact.FIELD.interpolant.split(states[2], exact.FIELD(states[2], grid[2].expand(5), {}), grid[2].expand(5))[
        0
    ]
    now = exact.FIELD.interpolant.split(states[5], exact.FIELD(states[5], grid[5].expand(5), {}), grid[5].expand(5))[0]
    lam = [math.log((1 - t) / t) for t in grid[[2, 5, 8]].tolist()]
    data = now + (lam[2] - lam[1]) / (2 * (lam[1] - lam[0])) * (now - before)
    t, s = grid[5].item(), grid[8].item()
    expected = s / t * states[5] + ((1 - s) - (1 - t) * s / t) * data
    assert (step(5, 8) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_straight_paths_cost_nothing(solver):
    noise = torch.randn(5, 3, generator=generator("straight"), dtype=torch.float64)
    matrix = costs(solver, 10, exact.STRAIGHT, noise)
    assert matrix[matrix.isfinite()].max() < 1e-24


@pytest.mark.parametrize(
    ("solver", "calls"), [("euler", 12), ("heun", 12 + 11 + 55), ("dpm_solver_pp_2m", 12), ("unipc3", 12)]
)
def test_what_it_costs_in_calls(solver, calls):
    """Of Heun one more for each of the 66 - 11 longer steps that do not end at data."""
    field = Counted(gaussian())
    costs(solver, field=field)
    assert field.calls == calls


class Narrow:
    """EDM's schedule, within a part of its times."""

    interpolant, t_range = edm(), (0.2, 0.9)

    def __call__(self, x_t, t, cond):
        return Rescheduled(gaussian(), edm())(x_t, t, cond)


def test_times_are_linear_and_begin_with_one():
    """Whatever the field's own schedule and range."""
    t_grid, _ = step_times.measure(Narrow(), UNIT, {}, solver="euler", fine=6)
    assert t_grid == pytest.approx([0.9, 0.76, 0.62, 0.48, 0.34, 0.2, 0.0])


# --- kept in the store ---

TEACHER = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[0.0, 0.0], std=[STD, STD]))


def counted(teacher=TEACHER):
    field = Counted(teacher.field)
    return dataclasses.replace(teacher, field=field), field


def find(store, teacher=TEACHER, **given) -> step_times.Costs:
    return step_times.find(teacher, store, **{"device": CPU, "fine": 12, "samples": 10, **given})


def test_what_was_measured_is_kept_and_not_measured_again(tmp_path):
    teacher, field = counted()
    first = find(tmp_path, teacher)
    assert field.calls == 12
    assert find(tmp_path, teacher) == first and field.calls == 12
    assert first.best(3).indices == [0, 6, 9, 12]
    assert first.best(3).times == [1.0, 0.5, 0.25, 0.0]
    ratio = first.best(3).cost / first.uniform(3).cost
    unit = costs()
    assert ratio == pytest.approx(summed(unit, [0, 6, 9, 12]) / summed(unit, [0, 4, 8, 12]), rel=1e-4)
    others = [{"fine": 11}, {"samples": 9}, {"seed": 1}, {"solver": "heun"}, {"settings": UNCHANGED}]
    for number, other in enumerate(others):
        find(tmp_path, teacher, **other)
        assert len(list((tmp_path / "schedules").iterdir())) == min(2 + number, 5), "the last asks for what is there"


def test_costs_that_are_not_finite_are_not_kept(tmp_path):
    broken = exact.Network(lambda x_t, t, cond: x_t / (t[:, None] > 0.6))
    with pytest.raises(
        RunError, match=r"a step of euler from t=1 is NaN or infinity on the paths of .*; nothing was saved"
    ):
        find(tmp_path, dataclasses.replace(TEACHER, field=broken))
    assert list((tmp_path / "schedules").iterdir()) == []
    assert find(tmp_path).best(3).indices == [0, 6, 9, 12]


def test_costs_are_those_of_the_samples_however_they_are_divided(tmp_path, monkeypatch):
    """Of a teacher with classes, too: path i has class i mod K."""
    means = torch.tensor([[0.0, 0.0], [3.0, -1.0]])
    classes = class_gaussian_teacher(means, torch.tensor([1.0, 1.0]), torch.tensor([0.5, 2.0]))
    for number, teacher in enumerate((TEACHER, classes)):
        whole = find(tmp_path / f"{number}", teacher, samples=7)
        with monkeypatch.context() as changed:
            changed.setattr(step_times, "MEMORY", 2 * 4 * 13 * 2 * 3)  # three samples at once
            parts = find(tmp_path / f"{number}-parts", teacher, samples=7)
        for row, other in zip(whole.costs, parts.costs, strict=True):
            assert other == pytest.approx(row, rel=1e-5, abs=1e-9)
    guided = find(tmp_path, classes, settings=FieldSettings(2.0))
    assert guided.costs != find(tmp_path, classes).costs


def test_uniform_steps_are_chosen_where_none_are_better():
    rows = [[0.0] * (6 - i) for i in range(6)]
    given = step_times.Costs(
        digest="", solver="euler", fine=6, samples=1, seed=0, guidance_scale=1.0,
        t_grid=[1 - i / 6 for i in range(7)], costs=rows,
    )  # fmt: skip
    assert [given.best(steps).indices for steps in (1, 2, 3, 6)] == [[0, 6], [0, 3, 6], [0, 2, 4, 6], list(range(7))]
    assert given.uniform(4).indices == [0, 2, 3, 5, 6], "as nearly as there are times"
    for steps in (0, 7):
        with pytest.raises(InputError, match=f"{steps} steps cannot be chosen from a grid of 6 steps; give 1 to 6"):
            given.best(steps)


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp_2m"])
def test_pairs_keep_their_states_at_the_times_found(tmp_path, solver):
    """Of the student's Euler steps, however the pairs are solved."""
    stage = PairsStage(kind="pairs", count=8, paths="trajectories", solver=solver, steps=12, optimal_times=3)
    found = step_times.with_times(stage, TEACHER, tmp_path, CPU)
    assert (found.times, found.optimal_times) == ([1.0, 0.5, 0.25, 0.0], None)
    assert step_times.with_times(found, TEACHER, tmp_path / "none", CPU) is found
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "format: 2 given; input should be 1"),
        ({"costs": []}, "costs: its rows are not those of 12 steps"),
        ({"costs": [[0.0] * n for n in range(11, -1, -1)]}, "costs: its rows are not those of 12 steps"),
        ({"t_grid": [5, -3, 7, 1e9, *[0] * 9]}, "t_grid: 13 times; valid: 13, decreasing from at most 1 to at least 0"),
        ({"t_grid": [1, 0.5, 0]}, "t_grid: 3 times; valid: 13, decreasing from at most 1 to at least 0"),
        ({"costs": [[-1.0] * n for n in range(12, 0, -1)]}, "costs: valid are finite numbers of at least 0"),
        ({"costs": [[math.inf] * n for n in range(12, 0, -1)]}, "costs: valid are finite numbers of at least 0"),
        ({"solver": "heun"}, "it was computed for another network, or with other settings"),
        ({"digest": "0" * 64}, "it was computed for another network, or with other settings"),
        (None, "it is not JSON"),
        ("fifo", "it is a FIFO, not a file"),
        ("link", "it is a link; links are not followed"),
    ],
)
def test_a_kept_file_that_does_not_fit_is_measured_again(tmp_path, capfd, change, reason):
    found = find(tmp_path)
    (path,) = (tmp_path / "schedules").iterdir()
    whole = path.read_bytes()
    if isinstance(change, str):
        path.rename(tmp_path / "moved")
        os.mkfifo(path) if change == "fifo" else path.symlink_to(tmp_path / "moved")
    else:
        path.write_text("" if change is None else json.dumps(json.loads(whole) | change))
    assert find(tmp_path) == found
    said = capfd.readouterr().err
    assert said.startswith(f"warning: {path} does not contain the requested step times (") and reason in said
    assert said.endswith("); they are computed again\n")
    assert path.read_bytes() == whole and not path.is_symlink()


def test_solvers_that_are_unknown_and_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"cannot save step times in .*file/schedules: Not a directory; use another store \(--store\)"
    ):
        find(tmp_path / "file")
    with pytest.raises(InputError, match="unknown solver 'eule': did you mean 'euler'"):
        find(tmp_path, solver="eule")


def test_solving_along_given_times():
    noise = torch.randn(5, 3, generator=generator("along"), dtype=torch.float64)
    for solver in SOLVERS:
        found = solvers.solve_along(exact.FIELD, noise, {}, solver=solver, times=[1.0, 0.75, 0.5, 0.25, 0.0])
        assert torch.equal(found, solvers.solve(exact.FIELD, noise, {}, solver=solver, steps=4))
    for times in ([1.0, 0.5], [0.9, 0.0], [1.0, 0.2, 0.4, 0.0], [1.0, 1.0, 0.0]):
        with pytest.raises(
            InputError, match=f"times {times[0]:g}, .*: must decrease from 1 to 0; times in between must be"
        ):
            solvers.solve_along(exact.FIELD, noise, {}, solver="euler", times=times)


@pytest.mark.parametrize("steps", range(1, 7))
def test_a_field_is_solved_along_the_times_that_were_found(steps):
    """From the noisiest time that it knows to the lowest."""
    t_grid, matrix = step_times.measure(Narrow(), UNIT, {}, solver="euler", fine=6)
    times = [1.0, *(t_grid[i] for i in step_times.least(matrix, steps)[1:])]
    counted = Counted(Narrow())
    found = solvers.solve_along(counted, UNIT, {}, solver="euler", times=times)
    assert counted.calls == steps
    if steps == 6:
        assert torch.equal(found, solvers.solve(Narrow(), UNIT, {}, solver="euler", steps=6))
    low = "times in between must be less than 0.9 and at least 0.2, where the teacher's velocity is defined"
    with pytest.raises(InputError, match=f"times 1, 0.1, 0: must decrease from 1 to 0; {low}"):
        solvers.solve_along(Narrow(), UNIT, {}, solver="euler", times=[1.0, 0.1, 0.0])
