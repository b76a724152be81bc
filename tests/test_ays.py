"""The costs of Align Your Steps: against their closed form on a Gaussian, and by quadrature on a mixture."""

import dataclasses
import hashlib
import itertools
import json
import math

import pytest
import torch

from distill.core.errors import InputError, RunError
from distill.flow.draws import generator
from distill.flow.fields import Counted, Rescheduled
from distill.flow.interpolants import edm
from distill.flow.times import uniform_grid
from distill.spec.guidancespec import FieldSettings
from distill.spec.model import GaussianTeacher, MixtureTeacher
from distill.students import ays, step_times
from distill.teachers.analytic import GaussianField, gaussian_teacher, mixture_teacher
from distill.testing import exact
from distill.testing.closed_form import class_gaussian_teacher

VARIANCE = 0.3
STD = math.sqrt(VARIANCE)
CPU = torch.device("cpu")
TEACHER = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[0.7, -1.0], std=[STD, STD]))
MIXTURE = mixture_teacher(MixtureTeacher(kind="mixture", means=[[-1.0], [1.2]], std=0.3, weights=[0.4, 0.6]))


def signal(t: torch.Tensor) -> torch.Tensor:
    """u = (alpha/sigma)^2 on the linear path."""
    return ((1 - t) / t).square()


def gaussian_costs(fine: int) -> torch.Tensor:
    """c(i, j) of N(m, VARIANCE), [fine, fine], between the times of a uniform grid above 0; per dimension."""
    u = 1 + VARIANCE * signal(uniform_grid(fine)[:-1])
    return (u[None] / u[:, None] - 1 - (u[None] / u[:, None]).log()) / 2


def test_the_closed_form_is_the_integral():  # S16
    """The mean square of k x - k_i x_i, with D(x, rho) = m + k (x - m), and x_i = x + noise."""
    field = GaussianField(torch.tensor([0.7]), torch.tensor([STD]))

    def gain(rho: torch.Tensor) -> torch.Tensor:
        t, x = rho / (1 + rho), torch.linspace(0, 1, 2, dtype=torch.float64)[:, None] / (1 + rho)
        ends = [each[:, None] - t[:, None] * field(each[:, None], t, {}) for each in x]
        return (ends[1] - ends[0]).squeeze(1)

    for high, low in ((80.0, 0.01), (3.0, 0.5)):
        log_rho = torch.linspace(math.log(low), math.log(high), 20_001, dtype=torch.float64)
        rho, first = log_rho.exp(), torch.tensor([high], dtype=torch.float64)
        k, k_i = gain(rho), gain(first)
        square = (k.square() - 2 * k * k_i) * (VARIANCE + rho**2) + k_i.square() * (VARIANCE + first**2)
        y = (1 + VARIANCE / low**2) / (1 + VARIANCE / high**2)
        assert torch.trapezoid(square / rho**2, log_rho).item() == pytest.approx((y - 1 - math.log(y)) / 2, rel=1e-6)


def test_costs_on_a_gaussian():  # S16
    dimensions, count, fine = 64, 4000, 8
    field = GaussianField(torch.full((dimensions,), 0.7), torch.full((dimensions,), STD))
    data = 0.7 + STD * torch.randn(count, dimensions, generator=generator("ays"), dtype=torch.float64)
    t_grid, costs = ays.measure(field, data, {}, seed=0, indices=range(count), fine=fine)
    assert t_grid == uniform_grid(fine).tolist()
    above = torch.ones(fine, fine).triu(1).bool()
    ratio = costs[:-1, :-1] / (dimensions * gaussian_costs(fine))
    assert (ratio[above] - 1).abs().max() < 0.01
    assert costs[:-1, :-1][~above].isinf().all() and costs[-1].isinf().all()
    assert torch.equal(costs[:-2, -1], costs[:-2, -2]), "a step to data costs as much as one to the last time above it"
    assert costs[-2, -1] == 0


def test_the_best_times_on_a_gaussian():  # S16
    """(y - 1 - ln y)/2 is convex in ln y, so in the best steps all ratios y = (1 + L u_j)/(1 + L u_i) are equal."""
    fine, steps = 400, 4
    whole = 1 + VARIANCE * (fine - 1) ** 2
    costs = torch.full((fine + 1, fine + 1), torch.inf, dtype=torch.float64)
    costs[:-1, 1:-1] = gaussian_costs(fine)[:, 1:]
    costs[:-1, -1] = costs[:-1, -2]
    costs[-2, -1] = 0
    indices = step_times.least(costs.masked_fill(torch.ones_like(costs).tril().bool(), torch.inf), steps)
    y = whole ** (1 / steps)
    found = sum(costs[i, j].item() for i, j in zip(indices[:-1], indices[1:], strict=True))
    assert 1 <= found / (steps * (y - 1 - math.log(y)) / 2) < 1.02
    best = [1 / (1 + math.sqrt((y**k - 1) / VARIANCE)) for k in range(steps)]
    assert [1 - i / fine for i in indices[:-1]] == pytest.approx(best, abs=2 / fine)


def divergence(rhos: list[float]) -> tuple[float, float]:
    """The sum of the costs of SDE steps to data N(0, VARIANCE), and the KL divergence of their samples, at the end.

    A step: x' = r x + (1 - r) D + rho' sqrt(1 - r) z with r = (rho'/rho)^2 and D = x VARIANCE/(VARIANCE + rho^2).
    """
    variance, cost = VARIANCE + rhos[0] ** 2, 0.0
    for rho, rho_next in itertools.pairwise(rhos):
        y, r = (1 + VARIANCE / rho_next**2) / (1 + VARIANCE / rho**2), (rho_next / rho) ** 2
        cost += (y - 1 - math.log(y)) / 2
        variance = (r + (1 - r) * VARIANCE / (VARIANCE + rho**2)) ** 2 * variance + rho_next**2 * (1 - r)
    ratio = (VARIANCE + rhos[-1] ** 2) / variance
    return cost, (ratio - 1 - math.log(ratio)) / 2


def test_the_bound_is_loose():
    """So loose that the times with the least sum are worse than uniform times, for the SDE as well."""
    assert divergence([80 * 8000 ** (-i / 10) for i in range(11)]) == pytest.approx((5.951, 0.1938), abs=5e-4)
    last, steps = 1 / 99, 8
    y = (1 + VARIANCE / last**2) ** (1 / steps)
    best = divergence([1e4, *(math.sqrt(VARIANCE / (y**k - 1)) for k in range(1, steps + 1))])
    uniform = divergence([1e4, *(k / (steps - k) for k in range(steps - 1, 0, -1)), last])
    assert best == pytest.approx((2.862, 0.3577), abs=5e-3) and uniform == pytest.approx((91.65, 0.1101), abs=5e-2)


def test_costs_on_a_mixture():
    """E || D(x_rho) - D(x_i) ||^2 = E || D(x_rho) ||^2 - E || D(x_i) ||^2, since D(x_i) = E[D(x_rho) | x_i]."""
    count, fine, means, weights = 20_000, 6, (-1.0, 1.2), (0.4, 0.6)
    x = torch.linspace(-10, 10, 1001, dtype=torch.float64)

    def mean_square(u: float) -> float:
        t = torch.full_like(x, 1 / (1 + math.sqrt(u)))
        std = torch.sqrt(t**2 + (1 - t) ** 2 * 0.09)
        density = sum(
            w * torch.exp(-(((x - (1 - t) * m) / std) ** 2) / 2) / std for m, w in zip(means, weights, strict=True)
        ) / math.sqrt(2 * math.pi)
        data = x - t * MIXTURE.field(x[:, None], t, {}).squeeze(1)
        return torch.trapezoid(density * data.square(), x).item()

    data = MIXTURE.exact_data(0, range(count)).double()
    _, costs = ays.measure(MIXTURE.field, data, {}, seed=0, indices=range(count), fine=fine)
    nodes = signal(uniform_grid(fine)[:-1]).tolist()
    grids = [torch.linspace(u, v, 21, dtype=torch.float64) for u, v in itertools.pairwise(nodes)]
    squares = [torch.tensor([mean_square(u) for u in grid.tolist()], dtype=torch.float64) for grid in grids]
    for i in range(fine - 1):
        changes = [torch.trapezoid(squares[k] - squares[i][0], grids[k]).item() / 2 for k in range(i, fine - 1)]
        for j, expected in enumerate(itertools.accumulate(changes), i + 1):
            assert costs[i, j].item() == pytest.approx(expected, rel=0.03)


class Narrow:
    """EDM's schedule, within a part of its times."""

    interpolant, t_range = edm(), (0.2, 0.9)

    def __call__(self, x_t, t, cond):
        return Rescheduled(GaussianField(torch.zeros(1), torch.full((1,), STD)), edm())(x_t, t, cond)


def test_a_field_is_called_within_its_range_only():
    counted = Counted(Narrow())
    data = STD * torch.randn(4000, 1, generator=generator("narrow"), dtype=torch.float64)
    t_grid, costs = ays.measure(counted, data, {}, seed=0, indices=range(4000), fine=5)
    assert t_grid == pytest.approx([0.9, 0.725, 0.55, 0.375, 0.2, 0])
    assert counted.calls == 2 * 5 - 1
    u = 1 + VARIANCE * signal(torch.tensor(t_grid[:-1]))
    y = (u[4] / u[0]).item()
    assert costs[0, 5].item() == pytest.approx((y - 1 - math.log(y)) / 2, rel=0.05)


# --- kept in the store ---


def find(store, teacher=TEACHER, **given) -> step_times.Costs:
    return step_times.find(teacher, store, **{"device": CPU, "criterion": "ays", "fine": 12, "samples": 10, **given})


def test_costs_are_kept_beside_those_of_the_error(tmp_path):
    field = Counted(TEACHER.field)
    teacher = dataclasses.replace(TEACHER, field=field)
    first = find(tmp_path, teacher)
    assert field.calls == 23 and first.criterion == "ays"
    assert find(tmp_path, teacher) == first and field.calls == 23
    other = find(tmp_path, teacher, criterion="error")
    assert other.criterion == "error" and other.costs != first.costs
    assert len(list((tmp_path / "schedules").iterdir())) == 2


def test_files_of_older_versions_are_found(tmp_path):
    """They say nothing of a criterion, neither in their name nor in their content."""
    found = find(tmp_path, criterion="error")
    key = json.dumps([1, TEACHER.digest, "euler", 12, 10, 0, 1.0])
    path = tmp_path / "schedules" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    content = json.loads(path.read_bytes())
    del content["criterion"]
    path.write_text(json.dumps(content))
    field = Counted(TEACHER.field)
    assert find(tmp_path, dataclasses.replace(TEACHER, field=field), criterion="error") == found and field.calls == 0


def test_a_field_whose_data_is_unknown_is_solved_first(tmp_path):
    field = Counted(TEACHER.field)
    solved = find(tmp_path / "solved", dataclasses.replace(TEACHER, field=field, exact_data=None), samples=400)
    assert field.calls == 12 + 23
    known = find(tmp_path / "known", samples=400)
    assert solved.best(1).cost == pytest.approx(known.best(1).cost, rel=0.15)


def test_costs_are_those_of_the_samples_however_they_are_divided(tmp_path, monkeypatch):
    """Also of a teacher with classes, whose samples have them in turn, and of its guided field."""
    means = torch.tensor([[0.0, 0.0], [3.0, -1.0]])
    classes = class_gaussian_teacher(means, torch.tensor([1.0, 1.0]), torch.tensor([STD, STD]))
    costs = {}
    for name, teacher, scale in (("one", TEACHER, 1.0), ("classes", classes, 1.0), ("guided", classes, 2.0)):
        whole = find(tmp_path / name, teacher, samples=7, settings=FieldSettings(scale))
        with monkeypatch.context() as changed:
            changed.setattr(step_times, "MEMORY", 2 * 4 * 13 * 2 * 3)  # three samples at once
            parts = find(tmp_path / f"{name}-parts", teacher, samples=7, settings=FieldSettings(scale))
        for row, other in zip(whole.costs, parts.costs, strict=True):
            assert other == pytest.approx(row, rel=1e-4, abs=1e-6)
        costs[name] = torch.tensor(whole.costs[0])
    assert (costs["one"] / costs["classes"] - 1).abs().max() < 1e-3, "the cost does not depend on the mean"


def test_what_cannot_be_measured(tmp_path):
    with pytest.raises(InputError, match="unknown criterion 'aye': did you mean 'ays'\\? valid: ays, error"):
        find(tmp_path, criterion="aye")
    with pytest.raises(InputError, match="solver heun: no effect with the criterion ays, whose times do not depend on"):
        find(tmp_path, solver="heun")
    broken = exact.Network(lambda x_t, t, cond: x_t / (t[:, None] > 0.6))
    with pytest.raises(
        RunError, match=r"the AYS cost of a step from t=1 is NaN or infinity on the paths of .*; nothing"
    ):
        find(tmp_path, dataclasses.replace(TEACHER, field=broken))
    assert list((tmp_path / "schedules").iterdir()) == []
