"""Sums over the samples of a row: the same numbers as from all samples at once, in bounded memory."""

import pytest
import torch

from distill.core.errors import RunError
from distill.evaluation.metrics.frechet import frechet
from distill.evaluation.metrics.reference import Reference, frechet_of
from distill.evaluation.tally import MOST_COMPARED, FeatureSums, RowSums, SeenBlock


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_blocks(features, size, sums):
    for part in features.split(size):
        sums.add(part)
    return sums


def test_mean_and_covariance_are_those_of_all_features():
    features = 100 + normal(1000, 5) @ normal(5, 5, seed=1)
    found = in_blocks(features, 64, FeatureSums(torch.full((5,), 99.0)))
    exact = features.double()
    torch.testing.assert_close(found.mean, exact.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.covariance, exact.T.cov(), rtol=1e-9, atol=1e-9)
    assert torch.equal(found.first, features) and found.count == 1000


def test_the_distance_is_that_of_all_features_at_once():
    real, some = 3 + normal(300, 4), 3.5 + 1.2 * normal(500, 4, seed=1)
    reference = Reference("FD", "", lambda x: x, real, frechet_of)
    measured = reference.measure(in_blocks(some, 96, reference.sums.like()))
    assert measured["distance"] == pytest.approx(frechet(some, real), rel=1e-9)


def test_no_more_features_are_kept_than_are_compared():
    sums = FeatureSums(torch.zeros(3))
    for number in range(30):
        sums.add(torch.full((400, 3), float(number)))
    assert sums.count == 12_000 and sums.first.shape == (MOST_COMPARED, 3)
    assert sums.first[-1, 0] == 12 and sums.mean[0] == 14.5
    whole = in_blocks(normal(6000, 2), 512, FeatureSums(torch.zeros(2), whole=True))
    assert torch.equal(whole.first, normal(6000, 2))


def test_one_sample_has_no_covariance():
    sums = FeatureSums.of(normal(1, 3))
    with pytest.raises(ValueError, match="a covariance needs two samples or more, got 1"):
        _ = sums.covariance


def block(judged, count):
    return SeenBlock(count, 10 * count, None, None, judged, 2.0, 3.0, 0.5, None)


@pytest.mark.parametrize("size", [7, 16, 100])
def test_samples_of_a_prompt_are_found_whatever_the_blocks_are(size):
    values = normal(100, 2)
    sums = RowSums(100, texts=30)
    for start in range(0, 100, size):
        part = values[start : start + size]
        sums.add(block({"f": part}, len(part)))
    found = sums.by_text("f")
    assert len(found) == 30 and sum(map(len, found)) == 100
    assert torch.equal(found[3], values[3::30])
    assert (sums.count, sums.numbers) == (100, 1000)


def test_of_many_prompts_the_first_are_compared():
    """20,000 samples of 4,000 prompts, five each: those of the first 1,000."""
    sums = RowSums(20_000, texts=4000)
    for start in range(0, 20_000, 500):
        numbers = torch.arange(start, start + 500).float()
        sums.add(block({"f": numbers[:, None]}, 500))
    found = sums.by_text("f")
    assert len(found) == 1000 and all(len(each) == 5 for each in found)
    assert found[999][:, 0].tolist() == [999, 4999, 8999, 12999, 16999]
    assert sum(map(len, sums.repeated["f"])) == MOST_COMPARED


def test_scores_and_features_are_not_mixed():
    sums = RowSums(4)
    sums.add(block({"f": torch.zeros(2)}, 2))
    with pytest.raises(RunError, match="the metric f returned scores for some images, and features for others"):
        sums.add(block({"f": torch.zeros(2, 3)}, 2))
