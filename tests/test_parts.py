"""Checkpoints that several ranks write: shares, reading in other parts than were written, and threads that meet."""

import threading

import pytest
import torch
from torch import distributed

from distill.core.errors import RunError
from distill.spec.model import CheckpointSpec
from distill.training import checkpoint_files
from distill.training.checkpoint import Checkpoints, latest
from distill.training.checkpoint_files import PieceMeta
from distill.training.meeting import Meeting
from distill.training.parts import RankParts, share_of
from distill.training.saving import Saver
from distill.training.world import World


def tensors() -> dict[str, torch.Tensor]:
    return {
        "scalar": torch.tensor(3.0), "none": torch.zeros(0, 4), "large": torch.arange(1000.0).reshape(20, 50),
        "half": torch.arange(30).to(torch.bfloat16), "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(7), "strided": torch.arange(12.0).reshape(3, 4).T,
    }  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_even_and_each_element_has_one_owner(size):
    whole, counted = tensors(), {name: torch.zeros(t.numel(), dtype=torch.int64) for name, t in tensors().items()}
    sizes = []
    for rank in range(size):
        share = share_of(whole, rank, size)
        sizes.append(sum(t.nbytes for t in share.tensors.values()))
        for name, tensor in share.tensors.items():
            start = share.pieces[name].start if name in share.pieces else 0
            counted[name][start : start + tensor.numel()] += 1
            assert torch.equal(tensor.reshape(-1), whole[name].reshape(-1)[start : start + tensor.numel()])
            if name in share.pieces:
                assert share.pieces[name].shape == list(whole[name].shape)
    assert all((each == 1).all() for each in counted.values())
    assert max(sizes) - min(sizes) <= 16  # an element of each neighbour


def written(folder, size, groups_of):
    """The checkpoint that `size` ranks write together, each in threads of this process. Returns the savers' errors."""
    store = distributed.HashStore()
    errors = {}

    def on_rank(rank):
        world = World(rank, size, store=store)
        checkpoints = Checkpoints(folder, CheckpointSpec(images=1), {"seed": 0}, {}, pytest.fail)
        saver = Saver(checkpoints, lambda saved: None, world)
        files = saver._copy(groups_of(rank))
        meeting = Meeting(world, 0, threading.Event())
        try:
            if rank:
                checkpoints.write_part(files, meeting)
            else:
                checkpoints.write(5, 80, files, meeting)
        except RunError as error:
            errors[rank] = str(error)
            if rank == 0:
                meeting.announce(None)

    threads = [threading.Thread(target=on_rank, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return errors


@pytest.mark.parametrize("size", [2, 3])
def test_what_several_ranks_wrote_is_read_whole_and_in_any_part(tmp_path, size):
    whole = tensors()
    assert written(tmp_path, size, lambda rank: [("network.student", share_of(whole, rank, size))]) == {}
    found = latest(tmp_path, pytest.fail)
    assert sorted(found.meta.files) == [f"network.student.{rank:05d}-of-{size:05d}.safetensors" for rank in range(size)]
    assert (found.meta.format, found.meta.step, found.groups) == (2, 5, "network.student")
    loaded = found.tensors("network.student")
    assert loaded.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
    with found.group("network.student") as group:
        flat = whole["large"].reshape(-1)
        for start, numel in ((0, 1), (0, 1000), (333, 400), (999, 1), (490, 20)):
            assert torch.equal(group.part("large", start, numel), flat[start : start + numel])


def test_a_piece_that_no_rank_wrote_is_an_error_and_not_zeros(tmp_path):
    def groups_of(rank):
        start = (0, 60)[rank]
        return [("g", RankParts({"w": torch.ones(40)}, {"w": PieceMeta(start=start, shape=[100])}))]

    assert written(tmp_path, 2, groups_of) == {}
    with latest(tmp_path, pytest.fail).group("g") as group:
        assert torch.equal(group.part("w", 60, 40), torch.ones(40))
        with pytest.raises(RunError, match="no file has the elements 40 to 100 of 'w'; the checkpoint is not complete"):
            group["w"]
        assert "w" in group and "v" not in group and [*group] == ["w"], "without reading it"


def test_one_rank_writes_files_as_before(tmp_path):
    assert written(tmp_path, 1, lambda rank: [("network.student", RankParts(tensors()))]) == {}
    found = latest(tmp_path, pytest.fail)
    assert list(found.meta.files) == ["network.student.safetensors"] and found.meta.format == 1


def test_a_rank_that_cannot_write_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    store = checkpoint_files.store

    def full(path, content):
        if "00001-of" in path.name:
            raise OSError(28, "No space left on device")
        return store(path, content)

    monkeypatch.setattr("distill.training.checkpoint.store", full)
    errors = written(tmp_path, 2, lambda rank: [("g", share_of(tensors(), rank, 2))])
    folder = tmp_path / "step-00000005"
    assert errors[0] == (
        f"cannot save checkpoint {folder}: rank 1: No space left on device; last good checkpoint: none yet"
    )
    assert errors[1].endswith(": No space left on device") and errors[1].startswith("cannot save checkpoint ")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_waits_for_nothing_if_there_is_no_folder(tmp_path):
    (tmp_path / "step-00000005").write_text("in the way")
    errors = written(tmp_path, 2, lambda rank: [("g", share_of(tensors(), rank, 2))])
    assert set(errors) == {0} and "Not a directory" in errors[0]


def test_damage_in_the_file_of_any_rank_is_found(tmp_path):
    assert written(tmp_path, 2, lambda rank: [("g", share_of(tensors(), rank, 2))]) == {}
    file = tmp_path / "step-00000005" / "g.00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match=r"every checkpoint in .* is damaged \(step-00000005: g\.00001-of-00002\.safe"):
        latest(tmp_path, pytest.fail)
