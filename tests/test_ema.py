"""Exponential moving averages of weights: the known result of the recurrence, half-lives, fp32."""

import pytest
import torch

from distill.training.ema import Ema, decay


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
