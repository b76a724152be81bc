"""Recipe cmt at its exact solution (sheet pretrain-tune 2.10): jumps between stored states."""

import pytest
import torch

from distill import testing
from distill.protocols import Batch, Pairs
from distill.testing import exact
from recipes.shortcut.cmt import Config, Recipe

TIMES = torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0], dtype=torch.float64)


def paths(count):
    noise = torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = torch.ones(count, dtype=torch.float64)
    states = torch.stack([noise - (1 - s) * exact.FLOW_MAP(noise, one, s * one, {}) for s in TIMES], dim=1)
    return Batch(None, Pairs(noise, states[:, -1], states, TIMES.expand(count, -1)), {})


def loss(network, count=64, **options):
    (turn,) = Recipe(Config(**options), None).turns(0, 0)
    return turn.loss({"student": exact.Network(network)}, paths(count), exact.context(count)).total


@pytest.mark.parametrize("to_data", [0.0, 0.25, 1.0])
def test_the_flow_map_has_no_loss(to_data):  # T1
    assert loss(exact.FLOW_MAP, to_data=to_data) < 1e-12
    assert loss(lambda x, t, s, cond: exact.FIELD(x, t, cond), to_data=to_data) > 1e-3


@pytest.mark.parametrize("to_data", [0.0, 0.4, 1.0])
def test_pairs_of_states_are_equally_likely(to_data):
    """10 pairs; those that end at the data more often, by to_data."""
    seen = []

    def record(x_t, t, s, cond):
        seen.append((t, s))
        return x_t

    loss(record, 40_000, to_data=to_data)
    t, s = seen[0]
    assert (s < t).all()
    found = {(a, b): ((t == a) & (s == b)).double().mean().item() for a in TIMES.tolist() for b in TIMES.tolist()}
    starts = [0.4, 0.3, 0.2, 0.1]  # how many pairs begin at each time, of 10
    for a, share in zip(TIMES.tolist()[:-1], starts, strict=True):
        for b in TIMES.tolist():
            if b < a:
                expected = (1 - to_data) / 10 + (to_data * share if b == 0 else 0)
                assert found[a, b] == pytest.approx(expected, abs=0.01)


SUBJECTS = [
    testing.Subject(
        "shortcut/cmt",
        steps=(1, 2, 4),
        times=tuple((1 - k / 16) for k in range(17)),
        closed_form=(lambda: test_the_flow_map_has_no_loss(0.25),),
    ),
]
