"""Recipe consistency at its exact solution (sheet consistency 1.8): zero at the flow map, order of a teacher step."""

import math

import pytest
import torch
from pydantic import ValidationError

from distill import testing
from distill.flow import times
from distill.flow.fields import jump_to_data
from distill.flow.interpolants import like
from distill.protocols import Batch
from distill.testing import exact
from distill.testing.closed_form import GaussianFlowMap, class_gaussian_teacher
from recipes.consistency import consistency
from recipes.consistency.consistency import Config, Recipe

CONTINUOUS = {"times": "continuous", "halving_images": 1000}
DISTANCES = ["l2", "pseudo_huber", "pseudo_huber_elementwise"]


def jump(x_t, t, s, cond):
    return x_t + like(s - t, x_t).double() * exact.FLOW_MAP(x_t, t, s, cond)


def recipe(**options):
    return Recipe(Config(**options), exact.teacher(exact.FIELD))


def loss(made, network, count=64, batch=None, **context):
    nets = exact.nets(made, exact.Given(exact.Network(network)))
    (turn,) = made.turns(0, 0)
    return turn.loss(nets, batch or exact.batch(count), exact.context(count, **context)).total


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("options", [{}, {"target_decay": 0.9}, CONTINUOUS])
def test_the_exact_flow_map_has_no_loss_under_an_exact_step(options, distance):  # T1
    made = recipe(distance=distance, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(consistency.solvers, "step", lambda teacher, x_t, t, s, cond, solver: jump(x_t, t, s, cond))
        assert loss(made, exact.FLOW_MAP, images=2500) < 1e-12
        assert loss(made, lambda x_t, t, s, cond: exact.FIELD(x_t, t, cond), images=2500) > 1e-4


@pytest.mark.parametrize(("point", "order"), [("euler", 2), ("heun", 3)])
def test_the_teachers_step_is_wrong_by_its_order(point, order):  # T1b
    def gap(levels):
        """Mean difference of the two ends; the loss is divided by t - s."""
        return loss(recipe(point=point, levels=levels, huber_c=1e-12), exact.FLOW_MAP, 4096) / levels

    errors = [gap(levels).item() for levels in (32, 64, 128)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("t", [0.25, 0.5, 1.0])
def test_without_a_teacher_the_target_is_in_the_mean_that_of_an_euler_step(t):  # T2
    """f is affine, so the mean of f(x_s) over the data that x_t may come from is f at the mean of x_s."""
    count, x_t = 200_000, torch.tensor([0.3, -0.8, 0.9], dtype=torch.float64)
    data, noise = exact.posterior(x_t, t, count)
    made, seen = recipe(point="data", levels=4), {}

    def record(prediction, target):
        seen["prediction"], seen["target"] = prediction, target
        return (prediction - target).square().mean(1)

    made.distance = record
    batch, fixed = Batch(data, None, {}), {"normals": {"noise": noise}, "uniforms": {"t": t - 0.125}}
    loss(made, exact.FLOW_MAP, count, batch, **fixed)
    at, to = torch.tensor([t], dtype=torch.float64), torch.tensor([t - 0.25], dtype=torch.float64)
    x_s = x_t + (to - at) * exact.FIELD(x_t[None], at, {})
    expected = jump_to_data(exact.Network(exact.FLOW_MAP), x_s, to, {})[0]
    spread = seen["target"].std(0) / math.sqrt(count)
    assert ((seen["target"].mean(0) - expected).abs() < 5 * spread + 1e-12).all()
    assert torch.allclose(seen["prediction"], jump(x_t[None], at, 0 * at, {}).expand(count, 3))


def test_easy_tuning_goes_to_the_data_itself_where_s_is_0():
    """And not to where one long step of the teacher leads."""
    made, seen = recipe(times="continuous", halving_images=1), {}

    def record(prediction, target):
        seen["target"] = target
        return (prediction - target).square().mean(1)

    made.distance = record
    data = exact.batch(64).data
    loss(made, exact.FLOW_MAP, 64, Batch(data, None, {}), uniforms={"t": 0.5})  # sigmoid(-1.1): a ratio of 1/3
    assert torch.equal(seen["target"], data)
    loss(made, exact.FLOW_MAP, 64, Batch(data, None, {}), uniforms={"t": 0.5}, images=5)
    assert (seen["target"] - data).abs().min() > 1e-6


def test_pseudo_huber_lies_between_the_norm_and_the_square():
    prediction, target = exact.batch(6).data, exact.batch(6, seed=1).data
    norm = (prediction - target).norm(dim=1)
    small, large = (recipe(huber_c=c).distance(prediction, target) for c in (1e-9, 1e5))
    assert torch.allclose(3 * small, norm, rtol=1e-7)
    assert torch.allclose(3 * large, norm.square() / 2e5, rtol=1e-7)
    every = recipe(distance="pseudo_huber_elementwise", huber_c=1e-9).distance(prediction, target)
    assert torch.allclose(every, (prediction - target).abs().mean(1), rtol=1e-7)
    assert torch.equal(
        recipe().distance(prediction, target), recipe(huber_c=0.00054 * math.sqrt(3)).distance(prediction, target)
    )


def test_lpips_compares_the_two_ends(lpips_options):
    made = Recipe(Config(point="data", distance="lpips", levels=2, **lpips_options), None)
    nets = exact.nets(made, exact.Given(exact.Network(lambda x_t, t, s, cond: 0.5 * x_t)))
    data, context = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1, exact.context(3)
    (turn,) = made.turns(0, 0)
    total = turn.loss(nets, Batch(data, None, {}), context).total
    t, s, gap = made.config.neighbours(context.draw.uniform("t", data), 0)
    ends = []
    for time in (t, s):
        at = like(time, data)
        x = (1 - at) * data + at * context.draw.normal("noise", data)
        ends.append(x - at * 0.5 * x)
    assert total.item() == pytest.approx((nets["lpips"](*ends) / gap).mean().item(), rel=1e-5) and total > 0.01


def test_a_guided_teacher_gives_the_flow_map_of_the_guided_law():  # oracle C
    means = torch.stack([exact.MEAN, -exact.MEAN])
    null, scale, labels = 0.5 * exact.MEAN, 2.5, torch.arange(64) % 2
    guided = torch.cat([null + scale * (means - null), null[None]])
    made = Recipe(Config(guidance_scale=scale, levels=512), class_gaussian_teacher(means, null, exact.STD))
    batch = Batch(exact.batch(64).data, None, {"class_labels": labels})
    right, wrong = (
        GaussianFlowMap(rows, exact.STD, conditional=True) for rows in (guided, torch.cat([means, null[None]]))
    )
    assert loss(made, right, batch=batch) < 1e-4 < 1e-1 < loss(made, wrong, batch=batch)


def test_times_close_in_on_each_other():
    u = torch.linspace(0, 1, 1000)
    assert recipe(levels=4).config.neighbours(u[:-1], 0)[0].unique().tolist() == [0.25, 0.5, 0.75, 1.0]
    for options in ({"levels": 4, "halving_images": 100}, {"times": "continuous", "halving_images": 100}):
        before = None
        for images in (0, 99, 100, 250):
            t, s, _ = recipe(**options).config.neighbours(u[:-1], images)
            assert ((s >= 0) & (s < t) & (t <= 1)).all()
            gap = (t - s).mean().item()
            if before is not None:
                assert gap == pytest.approx(before, rel=1e-6) if images == 99 else gap < 0.75 * before
            before = gap
        assert torch.equal(
            recipe(**options).config.neighbours(u, 1000)[1], recipe(**options).config.neighbours(u, 10**9)[1]
        )


def test_the_grids_of_the_papers_grow():
    """CT: N - 1 = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1), s0 = 2; iCT: 10, 20, ... 1280, each equally long."""
    ct = Config(curriculum="ct", levels=1, most_levels=150)
    for progress in (0, 0.01, 0.25, 0.9999):
        expected = math.ceil(math.sqrt(progress * (151**2 - 4) + 4) - 1)
        assert ct.steps(0, progress) == expected
    assert ct.steps(0, 0) == 1 and ct.steps(0, 1 - 1e-9) == 150
    ict = Config(curriculum="ict", levels=10)
    assert [ict.steps(0, (k + 0.5) / 8) for k in range(8)] == [10, 20, 40, 80, 160, 320, 640, 1280]
    assert ict.steps(0, 0.1249) == 10 and ict.steps(0, 0.1251) == 20
    assert Config(curriculum="ict", levels=10, most_levels=15).steps(0, 0.9) == 10, "at most a doubling"


def test_the_target_of_ct_follows_more_slowly_as_the_grid_grows():
    """mu = exp(s0 ln(mu0) / (N - 1)): with s0 = 2 and mu0 = 0.95, from 0.9025 at one step to 0.99932 at 150."""
    made = recipe(curriculum="ct", levels=1, target_decay=0.95)
    copy = made.networks(exact.Given(exact.Network(exact.FLOW_MAP)))["target"]
    assert copy.decay_at(0) == pytest.approx(0.9025) and copy.decay_at(1 - 1e-9) == pytest.approx(0.95 ** (2 / 150))
    assert (
        recipe(target_decay=0.95).networks(exact.Given(exact.Network(exact.FLOW_MAP)))["target"].decay_at(0.5) == 0.95
    )


@pytest.mark.parametrize("law", ["uniform", "log_normal"])
def test_the_authors_grid_is_edms(law):
    """sigma_i = (0.002^(1/7) + i/n (80^(1/7) - 0.002^(1/7)))^7; log_normal: as often as log sigma falls between two."""
    n, mu, spread = 18, -1.1, 2.0
    i = torch.arange(n + 1, dtype=torch.float64)
    sigma = (0.002 ** (1 / 7) + i / n * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    grid = sigma / (1 + sigma)
    grid[0], grid[-1] = 0, 1
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t, s, gap = Config(spacing="edm", level_law=law).neighbours(u, 0)
    found = torch.searchsorted(grid, t - 1e-9)
    assert torch.allclose(t, grid[found]) and torch.allclose(s, grid[found - 1]) and torch.equal(gap, t - s)
    shares = torch.bincount(found - 1, minlength=n) / len(u)
    ends = torch.special.ndtr((sigma.log() - mu) / spread)
    ends[0], ends[-1] = 0, 1
    expected = ends.diff() if law == "log_normal" else torch.full((n,), 1 / n, dtype=torch.float64)
    assert (shares - expected).abs().max() < 1e-4


def test_on_the_authors_grid_the_exact_flow_map_has_no_loss(monkeypatch):  # T1
    monkeypatch.setattr(consistency.solvers, "step", lambda teacher, x_t, t, s, cond, solver: jump(x_t, t, s, cond))
    options = {"spacing": "edm", "level_law": "log_normal", "curriculum": "ict", "huber_c": 1e-3}
    assert loss(recipe(**options), exact.FLOW_MAP, progress=0.4) < 1e-4
    assert loss(recipe(**options), lambda x_t, t, s, cond: exact.FIELD(x_t, t, cond), progress=0.4) > 1e-2


@pytest.mark.parametrize("images", [0, 10, 35])
def test_easy_tuning_has_its_own_times(images):
    """ln(sigma) is normal, and sigma' = sigma (1 - 2^-(a + 1) (1 + 8 sigmoid(-sigma))), at sigma 79 as anywhere."""
    u = torch.linspace(0.006, 0.999, 2000, dtype=torch.float64)
    t, s, gap = recipe(times="continuous", halving_images=10).config.neighbours(u, images)
    sigma, earlier = t / (1 - t), s / (1 - s)
    assert torch.allclose(sigma.log(), -1.1 + 2 * torch.special.ndtri(u), rtol=0, atol=1e-9)
    closeness = 0.5 ** (images // 10 + 1)
    expected = (sigma * (1 - closeness * (1 + 8 * torch.sigmoid(-sigma)))).clamp(min=0)
    assert torch.allclose(earlier, expected, rtol=1e-9, atol=1e-12)
    assert sigma.max() > 79
    ends = recipe(times="continuous", halving_images=10).config.neighbours(torch.tensor([0.0, 1.0]), images)
    assert (ends[0] >= ends[1]).all() and (ends[0] <= 1).all() and (ends[2] > 0).all()
    assert torch.allclose(gap, t - s, rtol=1e-9)
    near = torch.tensor([0.99987799])  # where t and s are the same in float32
    s, gap = times.nearer(near, 0.5**11)
    exact_s, exact_gap = times.nearer(near.double(), 0.5**11)
    assert near - s == 0 and gap.item() == pytest.approx(exact_gap.item(), rel=2e-3)
    assert exact_gap.item() == pytest.approx((near.double() - exact_s).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": "continuous"}, "times: continuous needs halving_images; without it, s stays 0 for most samples"),
        ({"times": "continuous", "levels": 4}, "levels: no effect with times: continuous; remove"),
        ({"mu": -1.0, "sigma": 1.0}, "mu, sigma: no effect with times: grid; remove"),
        ({"point": "data", "guidance_scale": 2.0}, "guidance_scale has no effect with point: data; remove it"),
        ({"distance": "l2", "huber_c": 0.1}, "huber_c has no effect with distance: l2; remove it"),
        ({"target_decay": 1.0}, "less than 1"),
        ({"most_levels": 40}, "most_levels has no effect without curriculum"),
        ({"curriculum": "ict", "halving_images": 10}, "halving_images has no effect with curriculum: ict"),
        ({"curriculum": "ct", "levels": 40, "most_levels": 20}, "most_levels=20 must be at least levels=40"),
        ({"times": "continuous", "spacing": "edm"}, "spacing: no effect with times: continuous"),
        ({"distance": "lpips"}, "distance: lpips needs lpips_trunk and lpips_path"),
        ({"lpips_trunk": "squeeze"}, "lpips_trunk: no effect with distance: pseudo_huber"),
        ({"distance": "lpips", "huber_c": 0.1}, "huber_c has no effect with distance: lpips"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValidationError) as caught:
        Config(**options)
    assert message in str(caught.value)


def test_it_needs_a_teacher_only_to_step():
    assert Config().needs == Config(point="euler").needs == {"data", "teacher"} and Config(point="data").needs == {
        "data"
    }
    assert consistency.Recipe.sampler == "renoise" and Config().student == "flow_map"


def steps_are_wrong_by_their_order():
    test_the_teachers_step_is_wrong_by_its_order("euler", 2)
    test_the_teachers_step_is_wrong_by_its_order("heun", 3)


SUBJECTS = [
    testing.Subject(
        "consistency/consistency",
        ring={"levels": 18},
        steps=(1, 2),
        closed_form=(
            lambda: test_the_exact_flow_map_has_no_loss_under_an_exact_step({}, "l2"),
            steps_are_wrong_by_their_order,
            lambda: test_without_a_teacher_the_target_is_in_the_mean_that_of_an_euler_step(0.5),
        ),
    )
]
