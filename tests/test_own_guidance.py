"""Guidance that a student learns from data alone (sheet consistency 6.1), at the flow map of a guided Gaussian law."""

import math

import pytest
import torch
from pydantic import ValidationError

from distill.core.errors import InputError
from distill.flow.interpolants import like
from distill.protocols import Batch
from distill.testing import exact
from distill.testing.closed_form import GaussianFlowMap, class_gaussian_teacher
from recipes.shortcut.meanflow import Config, Recipe

MEANS, NULL = torch.stack([exact.MEAN, -exact.MEAN]), 0.5 * exact.MEAN
FIELD = class_gaussian_teacher(MEANS, NULL, exact.STD).field
GUIDED = [{"omega": 2.5}, {"omega": 0.5, "kappa": 0.75}, {"omega": 0.2, "kappa": 0.92}]  # of the scales 2.5, 2 and 2.5


def config(**options):
    return Config(**{"velocity": "data", "label_dropout": 0.1, **options})


def flow_map(scale):
    """The flow map of each class, guided with this scale, and the unguided one without condition."""
    return GaussianFlowMap(torch.cat([NULL + scale * (MEANS - NULL), NULL[None]]), exact.STD, conditional=True)


def recipe(network, **options):
    made = Recipe(config(**options), None)
    return made, exact.nets(made, exact.Given(exact.Network(network), num_classes=2))


def inputs(count=64):
    x, t = exact.batch(count).data, torch.linspace(0.05, 1, count, dtype=torch.float64)
    cond = {"class_labels": torch.arange(count) % 2}
    return x, t, cond, {"class_labels": torch.full((count,), 2)}, torch.zeros(count, dtype=torch.bool)


@pytest.mark.parametrize("options", GUIDED, ids=str)
def test_the_solution_is_guided_with_the_scale_omega_by_one_minus_kappa(options):  # T1, oracle C
    """Its velocity at s = t solves the equation of the mix, and its flow map the identity of MeanFlow with the mix."""
    x, t, cond, null, dropped = inputs()
    scale = options["omega"] / (1 - options.get("kappa", 0))
    right, wrong = flow_map(scale), flow_map(1.0)
    gaps = []
    for network in (right, wrong):
        made, nets = recipe(network, **options)
        v = made.config.own_guided(nets["student"], x, t, FIELD(x, t, cond), cond, null, dropped)
        gaps.append((v - network(x, t, t, cond)).abs().max())
        s, rows = 0.3 * t, torch.arange(len(x))
        target = made.target(nets["student"], x, t, s, v, Batch(x, None, cond), rows)
        gaps.append((target - network(x, t, s, cond)).abs().max())
    assert max(gaps[:2]) < 1e-11 and min(gaps[2:]) > 1e-2


@pytest.mark.parametrize("options", GUIDED, ids=str)
@pytest.mark.parametrize(("t", "s"), [(0.7, 0.2), (0.4, 0.1)])
def test_the_solution_has_no_gradient_in_the_mean(options, t, s):  # T2
    """Samples of one class, given x_t; a part loses its condition, and does not count here."""
    count, x_t = 100_000, torch.tensor([0.3, -0.8, 0.9], dtype=torch.float64)
    data, noise = exact.posterior(x_t, t, count)
    batch = Batch(data, None, {"class_labels": torch.zeros(count, dtype=torch.int64)})

    def gradient(solution):
        shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)

        def network(x, t, s, cond):
            return solution(x, t, s, cond) + shift * like((cond["class_labels"] < 2).double(), x)

        made, nets = recipe(network, power=0.0, diagonal=0.5, time_law="uniform", **options)
        (turn,) = made.turns(0, 0)
        context = exact.context(count, normals={"noise": noise}, uniforms={"t": t, "s": s})
        turn.loss(nets, batch, context).total.backward()
        return shift.grad.abs().max()

    bound = 2 / 3 * 5 * options["omega"] * (noise - data).std(0).max() / math.sqrt(count)
    assert gradient(flow_map(options["omega"] / (1 - options.get("kappa", 0)))) < bound
    assert gradient(flow_map(1.0)) > 2 * bound


def test_conditions_are_dropped_where_s_is_t_and_the_velocity_is_that_of_the_sample():
    """A tenth of all samples; the derivative and guided velocities keep theirs."""
    seen = []

    def record(x, t, s, cond):
        seen.append((t, s, cond["class_labels"], x))
        return 0 * x

    count = 10_000
    made, nets = recipe(record, omega=3.0, power=0.0, derivative="central")
    (turn,) = made.turns(0, 0)
    batch = Batch(exact.batch(count).data, None, {"class_labels": torch.arange(count) % 2})
    found = turn.loss(nets, batch, exact.context(count))
    (t, s, labels, _), dropped = seen[-1], seen[-1][2] == 2
    assert (t == s)[dropped].all() and dropped.double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(labels[~dropped], batch.cond["class_labels"][~dropped])
    assert all((each[2] < 2).all() for each in seen[1:-1]), "of the derivative"
    noise = exact.context(count).draw.normal("noise", batch.data)
    factor = torch.where(dropped, 1.0, 3.0).double()  # u is 0, so that guidance multiplies noise - data by omega
    expected = ((noise - batch.data).square().mean(1) * factor.square()).mean().item()
    assert found.total.item() == pytest.approx(expected, rel=1e-9)


def test_guidance_is_confined_to_its_interval():
    x, t, cond, null, dropped = inputs()
    v, (made, nets) = FIELD(x, t, cond), recipe(flow_map(1.0), omega=2.0, guided_from=0.25, guided_to=0.75)
    moved = (made.config.own_guided(nets["student"], x, t, v, cond, null, dropped) - v).abs().amax(1) > 1e-6
    assert torch.equal(moved, (t >= 0.25) & (t <= 0.75)) and moved.any()


def test_without_classes_it_is_refused():
    made = Recipe(config(omega=2.0), None)
    with pytest.raises(InputError, match="omega has no effect without classes; remove it, or give labelled data"):
        made.networks(exact.Given(exact.Network(flow_map(1.0))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_dropout": 0.1}, "label_dropout: no effect without omega; remove them, or set omega"),
        ({"kappa": 0.5, "guided_to": 0.5}, "kappa, guided_to: no effect without omega"),
        ({"omega": 1.0, "label_dropout": 0.1}, "omega: 1 without kappa is no guidance"),
        ({"omega": 2.0}, "omega needs a null condition that is trained; set label_dropout above 0, such as 0.1"),
        ({"omega": 2.0, "label_dropout": 0.1, "guided_from": 1.0}, "guided_from=1.0 must be below guided_to=1"),
        ({"omega": 2.0, "label_dropout": 0.8}, "label_dropout=0.8 must be at most diagonal=0.75"),
        ({"omega": 2.0, "label_dropout": 0.1, "velocity": "teacher"}, "omega has no effect with velocity: teacher"),
        ({"omega": 2.0, "label_dropout": 0.1, "velocity": "pairs"}, "omega has no effect with velocity: pairs"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Config(**{"velocity": "data", **options})
