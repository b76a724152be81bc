"""Recipe pdd at its exact solution (sheet pretrain-tune 2.1): the slopes of the teacher's own steps."""

import pytest
import torch

from distill import testing
from distill.flow.interpolants import like
from distill.flow.times import shifted_grid
from distill.networks.policies import overlaps
from distill.networks.policy import PolicyStudent
from distill.spec import registry
from distill.testing import exact
from recipes.shortcut import pdd
from recipes.shortcut.pdd import Config, Recipe


def slope(x, t, s, solver):
    v = exact.FIELD(x, t, {})
    return v if solver == "euler" else exact.FIELD(x + like((s - t) / 2, x) * v, (t + s) / 2, {})


def chain(x, t, grid, solver):
    """The slopes [B, N, 3] of the steps of the teacher from x at t, and the end of its path."""
    slopes = []
    for start, end in zip(grid[:-1], grid[1:], strict=True):
        h = slope(x, start.expand(len(x)), end.expand(len(x)), solver)
        passed = like(start > t + 1e-6, x)
        slopes.append(torch.where(passed, 0, h))
        x = torch.where(passed, x, x + (end - start) * h)
    return torch.stack(slopes, dim=1), x


def student(grid, solver, wrong=0.0):
    network = exact.Network(lambda x, t, s, class_labels: chain(x, t / 1000, grid, solver)[0] + wrong)

    class Found:
        def __init__(self, sample):
            self.sample = sample

    class Outputs(torch.nn.Module):
        def forward(self, *given, class_labels=None):
            return Found(network(*given, class_labels))

    made = PolicyStudent(Outputs(), policy="steps", grid=grid)
    made.call = lambda network, x, t, s, cond: made.average(made(x, t, None, cond), x, t, s)
    return made


def loss(network, count=64, **options):
    (turn,) = Recipe(Config(**options), exact.teacher(exact.FIELD)).turns(0, 0)
    losses = [turn.loss({"student": network}, exact.batch(count), exact.context(count, step=k)).total for k in range(6)]
    return max(losses)


@pytest.mark.parametrize("states", ["student", "data"])
@pytest.mark.parametrize("solver", ["euler", "midpoint"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_slopes_of_the_teachers_steps_have_no_loss(states, solver, shift):  # T1
    """Whatever state the steps begin at, and however long they are: 4e-9 with times in float32, for shift 3."""
    options = {"states": states, "solver": solver, "shift": shift}
    grid = shifted_grid(32, shift)
    assert loss(student(grid, solver), **options) < (1e-20 if shift == 1 else 1e-10)
    assert loss(student(grid, solver, wrong=0.1), **options) > 1e-3


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_number_of_steps_makes_the_teachers_path(solver, steps):
    """The optimum is the teacher's solver in N steps, not its ODE."""
    recipe = Recipe(Config(solver=solver), exact.teacher(exact.FIELD))
    (grid, x), made = (torch.tensor(recipe.t_grids(None)[steps]), exact.batch(16).data), student(recipe.grid, solver)
    _, end = chain(x, torch.ones(16), recipe.grid, solver)
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        x = x + (s - t) * made(x, torch.full((16,), t), torch.full((16,), s), {})
    assert (x - end).abs().max() < 1e-12


def test_errors_of_the_solver_fall_with_more_intervals():
    """At x = 1.1 for a Gaussian of mean 0.7 and variance 0.3: 9.9e-2 ... 1.3e-2, and 2.4e-4 ... 4.7e-7."""
    mean, variance = 0.7, 0.3

    def velocity(x, t):
        return -mean + (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2) * (x - (1 - t) * mean)

    truth = mean + variance**0.5 * 1.1
    for solver, expected in (
        ("euler", [9.9e-2, 5.2e-2, 2.6e-2, 1.3e-2]),
        ("midpoint", [2.4e-4, 3.0e-5, 3.8e-6, 4.7e-7]),
    ):
        for count, error in zip((8, 16, 32, 64), expected, strict=True):
            x, h = torch.tensor(1.1, dtype=torch.float64), 1 / count
            for k in range(count):
                t = 1 - k * h
                v = velocity(x, t)
                x = x - h * (v if solver == "euler" else velocity(x - h / 2 * v, t - h / 2))
            assert abs(x.item() - truth) == pytest.approx(error, rel=0.05)


def test_a_step_is_the_sum_of_its_intervals():
    """Fusion: (s - t) sum_j w_j h_j = sum_j (t_j+1 - t_j) h_j, where the w_j add up to 1; also within an interval."""
    grid = shifted_grid(8, 2.0)
    t, s = grid[[0, 2, 4]], grid[[8, 5, 5]]
    weights = overlaps(grid, t, s)
    assert torch.allclose(weights.sum(1), torch.ones(3, dtype=torch.float64))
    expected = torch.where(
        (torch.arange(8) >= torch.tensor([[0], [2], [4]])) & (grid[1:] >= s[:, None]), -grid.diff(), 0
    )
    assert torch.allclose(weights * (t - s)[:, None], expected)
    inside = overlaps(grid, grid[:1] - 0.01, grid[1:2] - 0.02)
    assert (inside > 0).tolist() == [[True, True] + 6 * [False]]
    assert overlaps(grid, grid, grid).argmax(1).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7]


def test_steps_begin_where_a_student_can_be_and_never_pass_the_end():
    """n is a multiple of shortest, below N; k lies within the longest step from there."""
    seen = []

    class Seen(PolicyStudent):
        def average(self, outputs, x_t, t, s):
            seen.append((t, s))
            return super().average(outputs, x_t, t, s)

    options = {"intervals": 16, "shortest": 2, "longest": 8}
    made = student(shifted_grid(16), "euler")
    made.__class__ = Seen
    (turn,) = Recipe(Config(solver="euler", **options), exact.teacher(exact.FIELD)).turns(0, 0)
    for step in range(40):
        turn.loss({"student": made}, exact.batch(64), exact.context(64, step=step))
    starts, ends = ((16 * (1 - torch.cat(each))).round() for each in zip(*seen, strict=True))
    assert (starts % 2 == 0).all() and (starts < 16).all() and {*starts.tolist()} == set(range(0, 16, 2))
    assert ((ends - starts) >= 0).all() and (ends - starts).max() == 8 and (ends <= 16).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intervals": 30}, "intervals=30 is not a multiple of shortest=8; change either"),
        ({"longest": 12}, "longest=12; valid: multiples of shortest=8, at most intervals"),
        ({"longest": 64}, "longest=64; valid: multiples of shortest=8, at most intervals"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        registry.configure("shortcut/pdd", pdd, options, "stages.s")


SUBJECTS = [
    testing.Subject(
        "shortcut/pdd",
        steps=(1, 2, 4),
        short=testing.Training(307_200, batch_size=256, lr=2e-3),
        closed_form=(lambda: test_the_slopes_of_the_teachers_steps_have_no_loss("student", "midpoint", 1.0),),
    ),
]
