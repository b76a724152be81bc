"""The adaptive solver: its tableau, known numbers, a step size per sample, and its limits."""

import pytest
import torch
from benchmarks.solvers import mixture

from distill.core.errors import InputError, RunError
from distill.flow import dopri5
from distill.flow.dopri5 import CALLS, ERRORS, TIMES, WEIGHTS, solve_adaptive
from distill.flow.fields import Counted, Rescheduled, start
from distill.flow.interpolants import edm, linear
from distill.teachers.analytic import GaussianField
from distill.testing import exact
from distill.testing.closed_form import GaussianFlowMap, class_gaussian_teacher

MEAN, STD = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 1.3], dtype=torch.float64)
GAUSSIAN = GaussianField(MEAN, STD)


def rms(x):
    return x.square().mean().sqrt().item()


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_the_tableau_has_its_orders():
    """Rows sum to their times; the weights integrate t^4, those of the estimate t^3, exactly but no more."""
    for time, weights in zip(TIMES, WEIGHTS, strict=True):
        assert sum(weights) == pytest.approx(time, abs=1e-15)
    times, fifth = (0.0, *TIMES), (*WEIGHTS[-1], 0.0)
    fourth = [b - e for b, e in zip(fifth, ERRORS, strict=True)]
    for weights, order in ((fifth, 5), (fourth, 4)):
        for power in range(6):
            found = sum(b * c**power for b, c in zip(weights, times, strict=True))
            assert (abs(found - 1 / (power + 1)) < 1e-14) == (power < order), (order, power)
    # sum b_i a_ij c_j = 1/6, a condition of order 3 that no quadrature has
    found = sum(b * sum(a * c for a, c in zip(w, times, strict=False)) for b, w in zip(fifth[1:], WEIGHTS, strict=True))
    assert found == pytest.approx(1 / 6, abs=1e-14)


@pytest.mark.parametrize(
    ("tolerance", "most", "mean", "error"),
    [(1e-2, 31, 25.1, 1.0e-2), (1e-3, 49, 32.1, 2.5e-3), (1e-5, 85, 48.5, 1.9e-5)],
)
def test_known_numbers_on_a_mixture(tolerance, most, mean, error):
    field, noise, cond, truth = mixture()
    samples, calls = solve_adaptive(field, noise, cond, tolerance=tolerance)
    assert calls.max() == most and calls.double().mean().item() == pytest.approx(mean, abs=0.05)
    assert rms(samples - truth) == pytest.approx(error, rel=0.05)


def test_velocities_that_are_polynomials_of_time_are_integrated_exactly():
    """Of degree 4, with the longest steps: dx/dt = 5 t^4 goes from x to x - 1."""
    field = exact.Network(lambda x, t, cond: 5 * t[:, None] ** 4 + 0 * x)
    noise = randn(6, 1)
    samples, calls = solve_adaptive(field, noise, {}, tolerance=0.5)
    assert (samples - (noise - 1)).abs().max() < 1e-14
    assert calls.tolist() == [1 + 4 * CALLS] * 6  # steps of 1/8, 1/4, 1/2, and the rest


def test_a_sample_is_the_same_in_any_block_and_finished_ones_are_not_called():  # S17
    field, noise, _, truth = mixture()
    counted, noise = Counted(field), noise.float()
    samples, calls = solve_adaptive(counted, noise, {}, tolerance=1e-4)
    assert samples.dtype == torch.float32 and rms(samples - truth) < 1e-3
    assert counted.calls == calls.max() and counted.rows == calls.sum() < len(noise) * counted.calls / 1.4
    assert set(((calls - 1) % CALLS).tolist()) == {0}
    parts = [solve_adaptive(field, noise[i : i + 7], {}, tolerance=1e-4) for i in range(0, 512, 7)]
    assert (samples - torch.cat([part for part, _ in parts])).abs().max() < 1e-5
    assert torch.equal(calls, torch.cat([part for _, part in parts]))


def test_conditions_go_with_their_samples():
    means = torch.stack([MEAN, -MEAN])
    teacher, noise = class_gaussian_teacher(means, 0 * MEAN, STD), randn(8, 2)
    noise[0] *= 60  # takes more steps than the others, so they are not called with it in the end
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    samples, calls = solve_adaptive(teacher.field, noise, {"class_labels": labels}, tolerance=1e-7)
    assert calls[0] == calls.max()
    assert (samples - (means[labels] + STD * noise)).abs().max() < 1e-3


@pytest.mark.parametrize("t_range", [(0.1, 0.9), (0.002 / 1.002, 80 / 81)])
def test_no_call_is_made_outside_the_range_of_the_field(t_range):
    """The last step is the data prediction at the lowest time, with the velocity that is known there."""
    times = []

    class Recorded(GaussianField):
        def __call__(self, x_t, t, cond):
            times.append(t)
            return super().__call__(x_t, t, cond)

    field, noise = Recorded(MEAN, STD, edm(), t_range), randn(16, 2)
    samples, _ = solve_adaptive(field, noise, {}, tolerance=1e-8)
    called = torch.cat(times)
    assert called.min() == pytest.approx(t_range[0], abs=1e-12) and called.max() == pytest.approx(t_range[1], abs=1e-12)
    on_linear = Rescheduled(GaussianField(MEAN, STD, edm(), t_range), linear())
    low, high = (torch.full((16,), each, dtype=torch.float64) for each in on_linear.t_range)
    x = start(on_linear, noise)
    x = x + (low - high)[:, None] * GaussianFlowMap(MEAN, STD)(x, high, low, {})
    assert (samples - (x - low[:, None] * on_linear(x, low, {}))).abs().max() < 1e-6


def test_the_error_follows_the_tolerance():
    noise = randn(64, 2)
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        samples, calls = solve_adaptive(GAUSSIAN, noise, {}, tolerance=tolerance)
        errors.append((samples - (MEAN + STD * noise)).abs().max().item())
        assert errors[-1] < 5 * tolerance and calls.max() < 220
    assert all(after < before / 20 for before, after in zip(errors, errors[1:], strict=False))


def test_it_leaves_the_noise_alone_and_needs_no_gradients():
    noise = randn(4, 2).bfloat16().requires_grad_()
    before = noise.detach().clone()
    samples, _ = solve_adaptive(GAUSSIAN, noise, {}, tolerance=1e-2)
    assert samples.dtype == torch.bfloat16 and not samples.requires_grad and torch.equal(noise, before)
    assert (samples.double() - (MEAN + STD * noise.detach().double())).abs().max() < 0.1


def test_what_cannot_work_is_refused(monkeypatch):
    noise = randn(4, 2)
    for tolerance in (0.0, -1e-3, 1.0, float("nan")):
        with pytest.raises(InputError, match=f"^tolerance={tolerance} is not possible; give a number between 0 and 1"):
            solve_adaptive(GAUSSIAN, noise, {}, tolerance=tolerance)
    monkeypatch.setattr(dopri5, "MOST_TRIES", 20)
    with pytest.raises(RunError, match="^dopri5 did not reach the tolerance 1e-12 in 20 tries of a step; use a larger"):
        solve_adaptive(GAUSSIAN, noise.float(), {}, tolerance=1e-12)
    broken = exact.Network(lambda x, t, cond: x * torch.where(t < 0.5, torch.nan, 1.0)[:, None])
    samples, _ = solve_adaptive(broken, noise, {}, tolerance=1e-3)
    assert samples.isnan().all()
