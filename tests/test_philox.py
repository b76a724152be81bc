"""The random numbers of training: the published generator, the distribution, the same bits in any order."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from distill.flow import philox

CPU = torch.device("cpu")
ROW = 2**31 - 1  # the last that a global batch may have


def known(counter, key):
    """Philox 4x32-10 of one block, by Python's integers."""
    a, b, c, d = counter
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ key[0], right % 2**32, (left >> 32) ^ d ^ key[1], left % 2**32
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return a, b, c, d


def test_the_generator_is_the_published_one():
    # The first answers of the known-answer tests that the authors of Philox publish.
    assert [f"{word:08x}" for word in known((0, 0, 0, 0), [0, 0])] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    seed, row = 2**62 + 987654321, 12345
    blocks = [known((block, row, 0, 0), [seed % 2**32, seed >> 32]) for block in range(3)]
    expected = [(word % 2**24) / 2**24 for word in itertools.chain(*blocks)]
    assert philox.uniform(seed, range(row, row + 1), 12, CPU)[0].tolist() == expected


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 64, 1031])
@pytest.mark.parametrize("rows", [range(1), range(5, 9), range(ROW - 2, ROW)])
def test_pytorchs_kernel_and_ours_give_the_same_bits(rows, count, monkeypatch):
    """Where PyTorch has no kernel, ours computes the numbers, and this compares it with itself."""
    native = philox.normal(2**62 + 5, rows, count, CPU), philox.uniform(2**62 + 5, rows, count, CPU)
    monkeypatch.setattr(philox, "_native_agrees", lambda device_type: False)
    composed = philox.normal(2**62 + 5, rows, count, CPU), philox.uniform(2**62 + 5, rows, count, CPU)
    assert torch.equal(native[0], composed[0]) and torch.equal(native[1], composed[1])


def test_the_numbers_are_fixed():
    """A change here changes every training: raise `versions.DRAWS` with it."""
    numbers = philox.normal(7, range(3), 1001, CPU)
    golden = "20c690745f462530d7a1b2a4773a9beb3df8d514eb5a131c4214d32ccbfe9431"
    assert hashlib.sha256(numbers.contiguous().numpy().tobytes()).hexdigest() == golden


def test_normal_numbers_are_those_of_exactly_rounded_operations():
    """As NumPy computes them, whose float32 operations and square roots are rounded as IEEE 754 says on every CPU.

    PyTorch's square roots of long vectors are not: on an Intel CPU, the last bit of one in 200 was wrong, on an AMD CPU
    that of others.
    """
    f, u = np.float32, philox.uniform(7, range(3), 1002, CPU).numpy()

    def polynomial(y, coefficients):
        value = f(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            value = value * y + f(coefficient)
        return value

    w, r = 1 - u[:, :501], u[:, 501:] - f(0.5)
    exponent = (w.view(np.int32) - philox.SQRT_HALF) >> 23
    mantissa = (w.view(np.int32) - (exponent << 23)).view(f)
    s = (mantissa - 1) / (mantissa + 1)
    logarithm = polynomial(s * s, philox.ATANH) * s * f(-4) - exponent.astype(f) * f(2 * philox.LN2)  # -2 ln w
    radius, sin, cos = np.sqrt(logarithm), polynomial(r * r, philox.SIN) * r, polynomial(r * r, philox.COS)
    expected = np.concatenate([(sin * sin * f(-2) + 1) * radius, sin * cos * 2 * radius], axis=1)[:, :1001]
    assert expected.dtype == f
    assert np.array_equal(philox.normal(7, range(3), 1001, CPU).numpy(), expected)


def test_rows_and_threads_change_no_bit():
    whole, threads = philox.normal(3, range(64), 30011, CPU), torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(whole, philox.normal(3, range(64), 30011, CPU))
            assert torch.equal(whole[17:18], philox.normal(3, range(17, 18), 30011, CPU))
    finally:
        torch.set_num_threads(threads)


def test_normal_numbers_are_those_of_the_box_muller_transform():
    count = 50_000
    u = philox.uniform(1, range(4), 2 * count, CPU).double()
    radius, angle = (-2 * (1 - u[:, :count]).log()).sqrt(), 2 * torch.pi * (u[:, count:] - 0.5)
    exact = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    assert (philox.normal(1, range(4), 2 * count, CPU) - exact).abs().max() < 4e-6


def test_the_ends_of_the_radius():
    w = torch.tensor([2.0**-24, 0.5, 0.70710677, 0.70710683, 1 - 2.0**-24, 1.0])
    assert torch.allclose(philox._minus_two_log(w).double(), -2 * w.double().log(), rtol=3e-7, atol=0)
    assert philox._minus_two_log(w)[-1] == 0


def test_laws_within_a_row_and_across_rows():
    numbers = philox.normal(11, range(2000), 101, CPU)
    for sample in (numbers.flatten(), numbers[:, 0], numbers[:, 50], numbers[:, 51], numbers[0]):
        assert kstest(sample.numpy(), "norm").pvalue > 0.01
    assert kstest(philox.uniform(11, range(20000), 1, CPU).flatten().numpy(), "uniform").pvalue > 0.01
    for one, other in ((numbers[1:], numbers[:-1]), (numbers[:, :50], numbers[:, 50:100])):
        assert abs((one * other).mean() * (one.numel() ** 0.5)) < 4  # standard normal if independent
