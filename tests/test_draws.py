"""Random numbers: the same for any number of ranks and in any order, and their distributions."""

import hashlib
import re

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from distill.core.errors import InputError
from distill.flow import keyed_permutation
from distill.flow.draws import Rows, StepDraw, key, permutation, sample_labels, sample_noise
from distill.flow.fields import rows_to_call

# --- samples: (seed, index) alone ---


def test_sample_noise_is_fixed_forever():  # T23; a change here orphans every pair set ever made
    noise = sample_noise(7, [0, 1, 2, 10**9], (3, 4, 4))
    assert noise.dtype == torch.float32 and noise.shape == (4, 3, 4, 4)
    golden = "bb5eafcf1ac7fb83e566c8f6613206eab8492479f8791c1de4cc454d98cb2bfe"
    assert hashlib.sha256(noise.numpy().tobytes()).hexdigest() == golden


def test_sample_noise_is_the_same_in_any_chunks_and_order():  # T23
    whole = sample_noise(3, range(100), (2, 5))
    chunks = torch.cat([sample_noise(3, range(i, min(i + 7, 100)), (2, 5)) for i in range(0, 100, 7)])
    assert torch.equal(whole, chunks)
    order = permutation(100, "any").tolist()
    assert torch.equal(whole[order], sample_noise(3, order, (2, 5)))


def test_sample_noise_differs_by_seed_and_index_and_ignores_global_state():
    a = sample_noise(0, [0, 1], (64,))
    assert not torch.equal(a[0], a[1]) and not torch.equal(a, sample_noise(1, [0, 1], (64,)))
    torch.manual_seed(5)
    assert torch.equal(a, sample_noise(0, [0, 1], (64,)))


def test_sample_noise_is_standard_normal_within_and_across_samples():
    noise = sample_noise(11, range(2000), (8,))
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    assert kstest(noise[:, 0].numpy(), "norm").pvalue > 0.01
    neighbours = (noise[1:] * noise[:-1]).mean() * (1999 * 8) ** 0.5  # standard normal if independent
    assert abs(neighbours.item()) < 4


def test_labels_are_balanced_in_every_range():
    labels = sample_labels(range(13, 43), 10)
    assert torch.equal(labels.bincount(), torch.full((10,), 3)) and labels[0] == 3


def test_seeds_reach_the_largest_a_spec_allows():
    assert not torch.equal(sample_noise(2**63 - 1, [2**40], (4,)), sample_noise(2**63 - 2, [2**40], (4,)))


# --- steps: (seed, step, turn, name), rows of a global batch ---


@pytest.mark.parametrize("shape", [(3, 12, 12), (5,)])
@pytest.mark.parametrize("cuts", [[0, 12], [0, 6, 12], [0, 1, 5, 12], list(range(13))])
def test_any_number_of_ranks_draws_what_one_draws(shape, cuts):
    like = torch.zeros(12, *shape)
    one = StepDraw(seed=1, step=2, turn=0, rows=Rows(0, 12, 12))
    parts = [StepDraw(1, 2, 0, Rows(start, stop, 12)) for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]
    for kind in ("normal", "uniform"):
        split = [getattr(part, kind)("n", like[part.rows.start : part.rows.stop]) for part in parts]
        assert torch.equal(getattr(one, kind)("n", like), torch.cat(split))


def test_every_part_of_the_key_matters():
    like, rows = torch.zeros(4, 8), Rows(0, 4, 4)
    draws = [
        StepDraw(0, 0, 0, rows).normal("noise", like),
        StepDraw(1, 0, 0, rows).normal("noise", like),
        StepDraw(0, 1, 0, rows).normal("noise", like),
        StepDraw(0, 0, 1, rows).normal("noise", like),
        StepDraw(0, 0, 0, rows).normal("other", like),
    ]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert not torch.isclose(a, b).any()
    assert torch.equal(draws[0], StepDraw(0, 0, 0, rows).normal("noise", like))  # and nothing else does


def test_keys_do_not_run_together():
    assert key(1, 23) != key(12, 3) and key("a", "b") != key("ab") and 0 <= key("x") < 2**63


def test_draws_neither_use_nor_move_the_global_state():
    like, draw = torch.zeros(4, 8), StepDraw(0, 3, 0, Rows(0, 4, 4))
    torch.manual_seed(0)
    a, state = draw.normal("n", like), torch.get_rng_state()
    draw.uniform("u", like)
    sample_noise(0, [1], (3,))
    permutation(5, 1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(a, draw.normal("n", like))


def test_draws_follow_their_laws():
    like, draw = torch.zeros(20000, 2), StepDraw(0, 0, 0, Rows(0, 20000, 20000))
    assert kstest(draw.normal("n", like).flatten().numpy(), "norm").pvalue > 0.01
    u = draw.uniform("u", like)
    assert kstest(u.numpy(), "uniform").pvalue > 0.01 and u.min() >= 0 and u.max() < 1
    steps = torch.cat([StepDraw(0, step, 0, Rows(0, 1, 1)).uniform("u", torch.zeros(1)) for step in range(2000)])
    assert kstest(steps.numpy(), "uniform").pvalue > 0.01  # one draw of each of many steps, too


def test_dtypes_normal_as_like_uniform_always_float32():
    like, draw = torch.zeros(2, 3, dtype=torch.bfloat16), StepDraw(0, 0, 0, Rows(0, 2, 2))
    normal = draw.normal("n", like)
    assert normal.dtype == torch.bfloat16 and draw.uniform("u", like).dtype == torch.float32
    assert torch.equal(normal, draw.normal("n", like.float()).to(torch.bfloat16))


def test_a_part_of_a_batch_that_holds_no_sample_is_refused():
    said = re.escape("a fraction of 0.25 selects none or all of the 2 samples of a batch; increase batch_size")
    with pytest.raises(InputError, match=f"^{said}$"):
        StepDraw(0, 0, 0, Rows(0, 2, 2)).split(0.25, torch.zeros(2, 1))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.75, 1.0])
def test_a_split_is_the_same_for_any_micro_batches_and_its_parts_are_those_of_its_mask(fraction):
    whole = StepDraw(0, 0, 0, Rows(0, 20, 20)).split(fraction, torch.zeros(20, 1))
    assert int(whole.mask.sum()) == int(20 * fraction) and whole.mask.dtype == torch.bool
    parts = [StepDraw(0, 0, 0, Rows(at, at + 4, 20)).split(fraction, torch.zeros(4, 1)) for at in range(0, 20, 4)]
    assert torch.equal(torch.cat([part.mask for part in parts]), whole.mask)
    for part in (whole, *parts):
        assert torch.equal(part.rows, rows_to_call(part.mask)) and torch.equal(part.others, rows_to_call(~part.mask))


def test_a_draw_of_the_wrong_number_of_rows_is_refused():
    draw = StepDraw(0, 0, 0, Rows(2, 4, 8))
    for call in (draw.normal, draw.uniform):
        with pytest.raises(ValueError, match=r"draw 'x': 3 rows given, this micro-batch has Rows\(start=2, stop=4"):
            call("x", torch.zeros(3, 5))


@pytest.mark.parametrize(("start", "stop", "total"), [(0, 0, 4), (3, 2, 4), (0, 5, 4), (-1, 2, 4)])
def test_rows_outside_the_batch_are_refused(start, stop, total):
    with pytest.raises(ValueError, match=rf"rows \[{start}, {stop}\) are not within a global batch of {total}"):
        Rows(start, stop, total)


def test_a_keyed_permutation_has_each_number_once_at_any_size():
    for n in (*range(1, 70), 1000, 65_537):
        assert sorted(keyed_permutation.at(np.arange(n), n, "any").tolist()) == list(range(n))


def test_a_keyed_permutation_is_fixed_forever_and_looks_random():
    """A change here changes the order of the data of resumed runs."""
    n, places = 10**8, np.arange(3 * 10**7, 3 * 10**7 + 50_000)
    found = keyed_permutation.at(places, n, 3, 0)
    assert found[:4].tolist() == [37517407, 32414231, 38125068, 70428503]
    assert len(set(found.tolist())) == len(found)
    assert kstest(found / n, "uniform").pvalue > 0.01 and kstest(np.diff(found) % n / n, "uniform").pvalue > 0.01
    other = keyed_permutation.at(places, n, 3, 1)
    assert kstest((other - found) % n / n, "uniform").pvalue > 0.01
    assert np.array_equal(keyed_permutation.at(places[100:200], n, 3, 0), found[100:200])


def test_a_keyed_permutation_refuses_positions_that_it_does_not_have():
    for places in ([-1], [5]):
        with pytest.raises(ValueError, match="positions of a permutation of 5 numbers are 0 to 4"):
            keyed_permutation.at(np.array(places), 5, 3)


def test_permutations_are_keyed():
    a = permutation(100, 0, "epoch", 1)
    assert torch.equal(a, permutation(100, 0, "epoch", 1)) and torch.equal(a.sort().values, torch.arange(100))
    assert not torch.equal(a, permutation(100, 0, "epoch", 2)) and not torch.equal(a, permutation(100, 1, "epoch", 1))
