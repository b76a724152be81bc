"""Recipe consistency_fm at its exact solutions (reflow sheet 11, T15), for Gaussian data."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError

from distill import testing
from distill.flow import draws
from distill.flow.times import uniform_grid
from distill.protocols import Batch, Gridded
from distill.students.samplers import euler
from distill.testing import exact
from distill.testing.closed_form import class_gaussian_teacher
from recipes.reflow.consistency_fm import Config, Recipe

MEAN, STD = exact.MEAN, exact.STD


def jumps(segments):
    """The average velocity of the oracle's ODE from t to the end of its segment."""

    def field(x_t, t, cond):
        t = t.double()
        end = ((t * segments - 1e-6).ceil() - 1).clamp(min=0) / segments
        return exact.FLOW_MAP(x_t, t, end, cond)

    return field


def constant(x_t, t, cond):
    return torch.full_like(x_t, 0.25)


def noise(count, seed=0):
    return torch.randn(count, 3, generator=draws.generator("consistency_fm", seed), dtype=torch.float64)


def loss(options, velocity, batch, *, t=None, teacher=None, **normals):
    """Of a student that is this velocity; t: the time of all samples."""
    recipe = Recipe(Config(**options), teacher)
    (turn,) = recipe.turns(0, 0)
    uniforms = {} if t is None else {"t": 1 - t}
    context = exact.context(len(batch.data), normals=normals, uniforms=uniforms)
    return turn.loss(exact.nets(recipe, exact.Given(exact.Network(velocity))), batch, context).total


def line(count=64):
    """Data and noise of the straight paths."""
    start = noise(count)
    return Batch(MEAN + STD * start, None, {}), start


TEACHERS = [("data", None), ("teacher", exact.teacher(exact.STRAIGHT))]


@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize(("target", "teacher"), TEACHERS, ids=["data", "teacher"])
def test_straight_paths_have_no_loss(target, teacher, segments):  # T15
    batch, start = line()
    options = {"target": target, "segments": segments, "velocity_weight": 1.0}
    assert loss(options, exact.STRAIGHT, batch, noise=start, teacher=teacher) < 1e-12
    assert loss(options | {"delta": 0.1}, exact.STRAIGHT, batch, noise=start, teacher=teacher) < 1e-12
    assert loss(options | {"delta": 0.1}, exact.FIELD, batch, noise=start, teacher=teacher) > 1e-4


@pytest.mark.parametrize("end", [0.0, 0.5])
def test_velocities_are_compared_only_away_from_the_end_of_a_segment(end):  # T15
    batch, start = line()

    def bend(t, **options):
        """What the second term adds to the loss."""
        with_it, without = (
            loss({"delta": 0.1, "velocity_weight": weight, **options}, exact.FIELD, batch, t=t, noise=start).item()
            for weight in (0.5, 0.0)
        )
        return 2 * (with_it - without)

    assert bend(end + 0.1009) == 0 and bend(end + 0.05) == 0
    assert bend(end + 0.3, boundary=end + 0.3001) == 0 < bend(end + 0.3, boundary=end + 0.2999)
    t = end + 0.1011
    x_t, x_r = (exact.Network.interpolant.mix(batch.data, start, torch.full((64,), at).double()) for at in (t, t - 0.1))
    v_t, v_r = (exact.FIELD(x, torch.full((64,), at), {}) for x, at in ((x_t, t), (x_r, t - 0.1)))
    assert bend(t) == pytest.approx((v_t - v_r).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("t", "boundary", "length"),
    [
        (0.9, 0.0, 0.1),  # within a segment, f-(x_r, r) knows delta of the line
        (0.45, 0.0, 0.1),
        (0.55, 0.0, 0.1),  # r lies across the border, and f- leads back to it
        (0.05, 0.0, 0.05),  # r is 0
        (0.45, 0.36, 0.45),  # the line's own point at the end of the segment
        (0.45, 0.34, 0.1),
        (0.9, 0.85, 0.4),
        (1.0, 0.95, 0.5),  # the noise's segment begins at 1, the data's at 0.5
        (0.5, 0.45, 0.5),
    ],
)
def test_a_constant_velocity_misses_the_line_by_what_the_target_knows_of_it(t, boundary, length):
    """x_t - (t - e) c and the target differ by (t - r)(v - c), or (t - e)(v - c), v that of the line."""
    batch, start = exact.batch(32), noise(32)
    options = {"delta": 0.1, "boundary": boundary, "velocity_weight": 0.0}
    found = loss(options, constant, batch, t=t, noise=start).item()
    error = (start - batch.data - 0.25).square().mean().item()
    assert found == pytest.approx(length**2 * error, rel=1e-5)


def test_the_target_has_no_gradient():
    batch, start = exact.batch(32), noise(32)
    level = torch.zeros((), dtype=torch.float64, requires_grad=True)
    options = {"delta": 0.1, "velocity_weight": 0.0}
    loss(options, lambda x_t, t, cond: level + 0 * x_t, batch, t=0.9, noise=start).backward()
    slope = 0.1 * (start - batch.data).mean().item()  # of f_t - f-, whose own derivative is -(t - e)
    assert level.grad.item() == pytest.approx(-2 * 0.4 * slope, rel=1e-5)


def moments():
    """Eight samples of data and noise with the exact first and second moments of the oracle's, in each coordinate."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)), dtype=torch.float64)
    data, start = (signs[:, side, None].expand(4, 3) for side in (0, 1))
    return Batch(MEAN + STD * data, None, {}), start


def gradient(options, velocity, t, teacher=None):
    """Of the expected loss along 1 and x of each coordinate, exact: it is of second order in data and noise."""
    batch, start = moments()
    along = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)

    def moved(x_t, at, cond):
        return velocity(x_t, at, cond) + along[0] + along[1] * x_t

    loss(options, moved, batch, t=t, noise=start, teacher=teacher).backward()
    return along.grad.abs().max().item()


@pytest.mark.parametrize(("segments", "t"), [(1, 0.3), (1, 0.8), (1, 1.0), (2, 0.4), (2, 0.9)])
@pytest.mark.parametrize("target", ["data", "teacher"])
def test_the_fixed_point_jumps_along_the_ode(target, segments, t):
    """The gradient there, over delta, vanishes with delta; at the velocity of the ODE it does not."""
    teacher = exact.teacher(exact.FIELD) if target == "teacher" else None

    def residuals(velocity):
        options = {"target": target, "segments": segments, "velocity_weight": 0.0}
        return [
            gradient({**options, "delta": delta}, velocity, t, teacher) / delta for delta in (0.02, 0.01, 0.005, 0.0025)
        ]

    found = residuals(jumps(segments))
    for coarse, fine in itertools.pairwise(found):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.15)
    assert residuals(exact.FIELD)[-1] > 20 * found[-1]


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_one_step_for_each_segment_is_the_map_of_the_ode(segments):
    start = noise(16)
    t_grids = Recipe(Config(segments=segments), None).t_grids(None)
    grid = torch.tensor(t_grids[segments], dtype=torch.float64)
    samples = euler.sample(exact.Network(jumps(segments)), start, grid, {})
    assert (samples - MEAN - STD * start).abs().max() < 1e-12


def test_samples_are_made_in_multiples_of_the_segments():
    recipe = Recipe(Config(segments=3), None)
    assert isinstance(recipe, Gridded) and list(recipe.t_grids(None)) == [3, 6, 9, 12]
    assert all(grid == uniform_grid(n).tolist() for n, grid in recipe.t_grids(None).items())


def test_a_student_that_is_the_teacher_has_something_to_learn():
    """By so much as the teacher's velocity changes along its own step."""
    batch, start, t = exact.batch(64), noise(64), 0.9
    options = {"target": "teacher", "delta": 0.1, "velocity_weight": 0.0}
    found = loss(options, exact.FIELD, batch, t=t, noise=start, teacher=exact.teacher(exact.FIELD)).item()
    at, to = torch.full((64,), t).double(), torch.full((64,), t - 0.1).double()
    x_t = exact.Network.interpolant.mix(batch.data, start, at)
    v_t = exact.FIELD(x_t, at, {})
    v_r = exact.FIELD(x_t - 0.1 * v_t, to, {})
    assert found == pytest.approx((0.3 * (v_t - v_r)).square().mean().item(), rel=1e-4) and found > 1e-5
    assert gradient(options, exact.FIELD, t, exact.teacher(exact.FIELD)) > 1e-3


def test_a_guided_teacher_is_followed():
    means, null, scale = torch.stack([MEAN, -MEAN]), 0.5 * MEAN, 2.5
    guided, plain = (
        class_gaussian_teacher(means, null, STD),
        class_gaussian_teacher(scale * (means - null) + null, null, STD),
    )
    batch = Batch(exact.batch(32).data, None, {"class_labels": torch.arange(32) % 2})
    options = {"target": "teacher", "delta": 0.1}
    found = [
        loss({**options, "guidance_scale": w}, constant, batch, noise=noise(32), teacher=teacher).item()
        for w, teacher in ((scale, guided), (1.0, plain), (1.0, guided))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-9) and found[0] != pytest.approx(found[2], rel=1e-2)


def test_times_cover_all_but_the_data():
    seen = []

    def record(x_t, t, cond):
        seen.append(t)
        return 0 * x_t

    loss({"delta": 0.1}, record, exact.batch(4000))
    t, r = seen
    assert t.min() > 0 and t.max() <= 1 and r.min() == 0
    assert t.mean().item() == pytest.approx(0.5, abs=0.02) and torch.allclose(t - r, t.clamp(max=0.1), atol=1e-6)
    seen.clear()
    loss({"delta": 0.1}, record, exact.batch(4), t=1.0)
    assert (seen[0] == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale has no effect with target: data; remove it, or use target: teacher"),
        (
            {"target": "teacher", "boundary": 0.1},
            "boundary has no effect with target: teacher; remove it, or use target",
        ),
        ({"delta": 0.5}, "delta: 0.5 is too large for the length of a segment; valid: below 0.495 with segments: 2"),
        (
            {"delta": 0.3, "segments": 4},
            "delta: 0.3 is too large for the length of a segment; valid: below 0.248 with segments: 4",
        ),
        ({"boundary": 1.0}, "less than 1"),
        ({"segments": 0}, "greater than 0"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValidationError) as caught:
        Config(**options)
    assert message in str(caught.value)


def test_what_it_needs():
    assert Config().needs == {"data"} and Config(target="teacher").needs == {"data", "teacher"}
    assert Config().student == "velocity" and Recipe.sampler == "euler"


SUBJECTS = [
    testing.Subject(
        "reflow/consistency_fm",
        {"delta": 0.01},  # the least whose loss is more than bf16's rounding, as its option says
        ring={"delta": 0.05},  # the paper's 0.001 suits ten thousands of steps, not a thousand
        steps=(2,),
        closed_form=(
            lambda: test_straight_paths_have_no_loss(*TEACHERS[0], 2),
            lambda: test_straight_paths_have_no_loss(*TEACHERS[1], 2),
            lambda: test_the_fixed_point_jumps_along_the_ode("data", 2, 0.9),
            lambda: test_one_step_for_each_segment_is_the_map_of_the_ode(2),
        ),
    )
]
