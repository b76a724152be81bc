"""Memory of a rank: the prediction against a calculation by hand, and the measurement while autograd keeps tensors."""

import pytest
import torch
from torch import nn

from distill.training.memory import Activations, predict, storages
from distill.training.plain import Plain
from distill.training.zero import Zero

SIZES = {"student": [100, 7], "critic": [20]}


@pytest.mark.parametrize(
    ("sharding", "procs", "expected"),
    [
        (Plain(), 1, (127 + 107, 107, 2 * 127, 2 * 107)),  # one copy of the student, gradients of one turn
        (Zero(0), 2, (127 + 107, 107, 2 * 127, 2 * 107)),
        (Zero(1), 2, (127 + 107, 54, 3 * 64, 2 * 54)),  # the odd parameter is padded
        (Zero(2), 4, (127 + 107, 27, 3 * 32, 2 * 27)),
        (Zero(3, persistence_threshold=0), 2, (64 + 107, 64, 3 * 64, 2 * 54)),
        (Zero(3, persistence_threshold=20), 2, (64 + 27 + 107, 64, 3 * 64, 2 * 54)),
        (Zero(2), 1, (127 + 107, 127 - 20, 3 * 127, 2 * 107)),
        (Zero(3), 1, (127 + 107, 127, 3 * 127, 2 * 107)),
        (Zero(3), 2, (64 + 127 + 107, 64, 3 * 64, 2 * 54)),  # all are small: whole beside their parts
    ],
)
def test_prediction_by_hand(sharding, procs, expected):
    found = predict(SIZES, ["student"], 2, procs, sharding)
    assert tuple(found.values()) == tuple(4 * count for count in expected)


def test_what_lies_in_the_same_memory_counts_once():
    whole = torch.zeros(10)
    assert list(storages([whole, whole[:3], whole.view(2, 5), torch.zeros(0)]).values()) == [40]


def test_activations_are_counted_until_the_backward_pass_takes_them():
    layer = nn.Linear(3, 3)
    with Activations() as counted:
        x = torch.ones(4, 3)
        y = layer(x)  # keeps x, and the weight, which is no activation
        assert counted.now == 48
        z = y * y  # keeps y, twice
        assert counted.now == 96
        w = z.exp()  # keeps its result
        assert counted.now == counted.peak == 144
        w.sum().backward()
        del x, y, z, w
        assert (counted.now, counted.peak) == (0, 144)
        layer(torch.ones(1, 3)).sum()
        assert counted.peak == 144


def test_activations_are_counted_no_more_once_closed():
    layer = nn.Linear(3, 3)
    with Activations() as counted:
        first = layer(torch.ones(2, 3))
        counted.close()
        second = layer(torch.ones(100, 3))
        assert counted.peak == 24
        counted.close()
    first.sum().backward()
    second.sum().backward()
    assert (counted.now, counted.peak) == (0, 24)
