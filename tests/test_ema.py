"""Exponential moving averages of weights: the known result of the recurrence, half-lives, fp32."""

import pytest
import torch

from distill.training.ema import Ema, decay, exponent, mixture


def test_an_average_is_its_recurrence():
    weight = torch.zeros(3)
    ema = Ema({"w": weight}, [40.0, 1000.0])
    expected = {40.0: 0.0, 1000.0: 0.0}
    for step in range(50):
        weight.fill_(float((step * 7) % 5))
        ema.update(step * 16, 16)
        for half_life in expected:
            ramped = min(half_life, 0.05 * step * 16)
            d = 0.5 ** (16 / ramped) if ramped else 0.0
            expected[half_life] = d * expected[half_life] + (1 - d) * float((step * 7) % 5)
    for half_life, value in expected.items():
        torch.testing.assert_close(ema.averages[half_life]["w"], torch.full((3,), value), rtol=1e-5, atol=1e-6)


def test_a_half_life_is_one():
    """After the ramp, weights that jump from 0 to 1 are halfway there after one half-life, whatever the batch."""
    for batch in (1, 8, 64):
        weight = torch.zeros(1)
        ema = Ema({"w": weight}, [64.0])
        weight.fill_(1.0)
        for start in range(10_000, 10_064, batch):
            ema.update(start, batch)
        assert ema.averages[64.0]["w"].item() == pytest.approx(0.5, abs=1e-6)


def test_the_start_is_forgotten_at_once():
    weight = torch.full((2,), 1e6)
    ema = Ema({"w": weight}, [1e9])
    weight.fill_(3.0)
    ema.update(0, 8)
    assert torch.equal(ema.averages[1e9]["w"], torch.full((2,), 3.0))
    assert decay(1e9, 0, 8) == 0.0 and decay(1e9, 10**12, 8) == pytest.approx(1 - 8e-9 * 0.693147, abs=1e-12)


def test_averages_are_fp32_and_keep_small_moves():
    """In bf16 a move of 2^-10 of the weight would be lost."""
    weight = torch.ones(1, dtype=torch.bfloat16)
    ema = Ema({"w": weight}, [16.0])
    weight.fill_(2.0)
    for _ in range(4):
        ema.update(10**9, 1)
    assert ema.averages[16.0]["w"].dtype == torch.float32
    assert ema.averages[16.0]["w"].item() == pytest.approx(2 - 0.5**0.25, rel=1e-6)


def test_the_exponents_are_those_of_edm2():
    """Karras et al. 2023, sec. 3.1 and eq. 126: gamma = 16.97 and 6.94 have relative lengths of 5 and 10 percent."""
    assert [exponent(0.05), exponent(0.10)] == pytest.approx([16.97, 6.94], abs=0.005)
    for length in (0.01, 0.1, 0.28):
        gamma = exponent(length)
        assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(length, rel=1e-9)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.28])
def test_an_average_by_a_power_has_its_weights_in_closed_form(length):
    """After n steps, step k has ((k / n)^(gamma + 1) - ((k - 1) / n)^(gamma + 1)), the integral of the power."""
    count = 40
    values = torch.tensor([float((k * 7) % 5) for k in range(1, count + 1)], dtype=torch.float64)
    weight = torch.full((1,), 1e6)  # forgotten at once
    ema = Ema({"w": weight}, [], [length])
    for k, value in enumerate(values):
        weight.fill_(float(value))
        ema.update(16 * k, 16)
    edges = (torch.arange(count + 1, dtype=torch.float64) / count) ** (exponent(length) + 1)
    assert ema.averages[length]["w"].item() == pytest.approx(((edges[1:] - edges[:-1]) * values).sum().item(), rel=1e-5)


def test_the_average_of_a_parabola_is_known():
    """(t / T)^2 averaged by a density of t^gamma is (gamma + 1) / (gamma + 3)."""
    weight, count = torch.zeros(1, dtype=torch.float64), 4000
    ema = Ema({"w": weight}, [], [0.1])
    for k in range(count):
        weight.fill_(((k + 0.5) / count) ** 2)
        ema.update(k, 1)
    gamma = exponent(0.1)
    assert ema.averages[0.1]["w"].item() == pytest.approx((gamma + 1) / (gamma + 3), abs=1e-4)


KEPT = (0.05, 0.1)


@pytest.mark.parametrize("length", [0.07, 0.15, 0.2])
def test_other_lengths_are_made_from_snapshots(length):
    """Of a walk whose steps get smaller, as training's do. The error is relative to what the average differs by."""
    torch.manual_seed(0)
    weight, count = torch.zeros(64), 1600
    ema = Ema({"w": weight}, [], [*KEPT, length])
    snapshots = []
    for k in range(count):
        weight += torch.randn(64) * (1 - k / count)
        ema.update(k, 1)
        if (k + 1) % 100 == 0:
            snapshots += [((k + 1, each), ema.averages[each]["w"].double()) for each in KEPT]
    shares = mixture([place for place, _ in snapshots], count, length)
    assert sum(shares) == pytest.approx(1, abs=1e-9)
    made = sum(share * tensor for share, (_, tensor) in zip(shares, snapshots, strict=True))
    wanted = ema.averages[length]["w"].double()
    nearest = min(((wanted - snapshots[-1 - i][1]).norm() for i in range(2)), key=float)
    assert (made - wanted).norm() < 0.02 * nearest


def test_a_length_that_was_kept_is_the_snapshot_itself():
    places = [(images, length) for images in (500, 1000) for length in KEPT]
    assert mixture(places, 1000, 0.1) == pytest.approx([0, 0, 0, 1], abs=1e-6)
    assert mixture(places, 500, 0.05) == pytest.approx([1, 0, 0, 0], abs=1e-6)
