"""One rank among others: its rows, and how it handles a lost connection. test_ranks tests collectives."""

import pytest
import torch

from distill.core.errors import PeerLost, RunError
from distill.flow.draws import Rows
from distill.training.world import ALONE, World


@pytest.mark.parametrize(("size", "micro_batch"), [(1, 24), (1, 4), (2, 12), (3, 4), (6, 2)])
def test_ranks_share_a_batch_in_its_order(size, micro_batch):
    parts = [rows for rank in range(size) for rows in World(rank, size).rows(24, micro_batch)]
    assert parts == [Rows(start, start + micro_batch, 24) for start in range(0, 24, micro_batch)]


def test_alone_nothing_is_waited_for():
    values = torch.arange(3.0)
    assert ALONE.first and torch.equal(ALONE.mean(values), values)
    assert ALONE.meet("here", True, False) == [True, False]
    assert ALONE.alone("work", lambda: 5) == 5


def test_a_lost_connection_says_where_it_was_lost():
    with (
        pytest.raises(
            PeerLost,
            match=r"^rank 1, step 3, turn 0: lost contact with another rank, which has exited or hangs "
            r"\(\[gloo\] closed\)$",
        ),
        World(1, 2).contact("step 3, turn 0"),
    ):
        raise RuntimeError("[gloo] closed\nat pair.cc")


def test_other_errors_stay_what_they_are():
    message = "loss nan at step 3 of runs/connection-timeout; last good checkpoint: none yet"
    with pytest.raises(RunError, match=message), ALONE.contact("step 3, turn 0"):
        raise RunError(message)
    with pytest.raises(RuntimeError, match="size mismatch"), World(1, 2).contact("step 3, turn 0"):
        raise RuntimeError("size mismatch")
