"""Adaptive guidance and CADS in the benchmark of guidance."""

import dataclasses

import torch
from benchmarks import guidance

from distill.flow.draws import generator
from distill.flow.fields import Counted
from distill.flow.solvers import grid_of, solve
from distill.spec.guidancespec import FieldSettings, GuidanceSpec
from distill.testing.closed_form import class_gaussian_teacher

MEANS = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0]], dtype=torch.float64)
NULL = torch.tensor([-0.5, 1.0, 0.2], dtype=torch.float64)
TEACHER = class_gaussian_teacher(MEANS, NULL, torch.full((3,), 0.3, dtype=torch.float64).sqrt())
NOISE = torch.randn(8, 3, generator=generator("guidance bench"), dtype=torch.float64)
CLASSES = {"class_labels": torch.arange(8) % 2}
STEPS, SCALE = 8, 2.0


def samples(field):
    return solve(field, NOISE, CLASSES, solver="ab3", steps=STEPS)


def stopped_at(k):
    """The samples of classifier-free guidance in the first k + 1 calls."""
    low = grid_of(TEACHER.field, STEPS)[k + 1]
    return samples(TEACHER.field_with(FieldSettings(SCALE, GuidanceSpec(interval=(low, 1.0)))))


def test_guidance_that_stops_itself():
    def with_limit(limit):
        return samples(guidance.StopsItself(TEACHER, SCALE, limit))

    assert (with_limit(1.1) - samples(TEACHER.guided(SCALE))).abs().max() < 1e-12, "never stops"
    assert (with_limit(-1.1) - stopped_at(0)).abs().max() < 1e-12, "stops after the first call"
    counted = Counted(TEACHER.field)
    found = samples(guidance.StopsItself(dataclasses.replace(TEACHER, field=counted), SCALE, 0.2))
    distances = torch.stack([(stopped_at(k) - found).abs().amax(1) for k in range(STEPS)])  # [steps, 8]
    assert distances.amin(0).max() < 1e-12, "each sample is that of an interval"
    times = distances.argmin(0)
    assert len(times.unique()) > 2
    assert counted.rows == 8 * STEPS + (times + 1).sum()


def test_the_time_at_which_all_samples_stop():
    times = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert guidance.stop_interval(times, [0.9, 0.8, 0.95, 0.99], 0.94) == (0.25, 1.0)
    assert guidance.stop_interval(times, [0.9, 0.8, 0.95, 0.99], 0.999) == (0.0, 1.0)


def test_cads_keeps_mean_and_deviation_of_each_condition():
    kept = guidance.gamma(torch.tensor([0.0, 0.6, 0.675, 0.9, 1.0], dtype=torch.float64), 0.6, 0.9)
    assert (kept - torch.tensor([1, 1, 0.75, 0, 0], dtype=torch.float64)).abs().max() < 1e-12
    random = generator("cads test")
    y, noise = torch.randn(2, 5, 20_000, generator=random, dtype=torch.float64)
    y = y * torch.arange(1, 6)[:, None] - 3
    found = guidance.annealed(y, noise, kept, 2.0)
    assert (found.mean(1) - y.mean(1)).abs().max() < 1e-12
    assert (found.std(1) - y.std(1)).abs().max() < 1e-12
    signal = kept * y.var(1)
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(found, y, strict=True)])
    assert (correlation - (signal / (signal + 4 * (1 - kept))).sqrt()).abs().max() < 0.03


def test_cads_leaves_the_null_condition_and_late_times_as_they_are():
    embedding = torch.nn.Embedding(11, 16)
    noisy = guidance.NoisyEmbedding(embedding, 10, 0.6, 0.9, 0.25)
    labels, noisy.t = torch.tensor([3, 10, 3, 3]), torch.tensor([0.95, 0.95, 0.5, 0.8])
    changed = (noisy(labels) != embedding(labels)).any(1)
    assert changed.tolist() == [True, False, False, True]
