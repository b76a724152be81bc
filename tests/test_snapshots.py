"""Snapshots of averages: which are kept, that they survive kills to the bit, and what is made from them."""

import pytest
import torch
from programs.train_vector import Alternating, FlowMatching, KilledAt, KilledError, averages, train

from distill.core.errors import InputError
from distill.training import checkpoint_files, snapshots
from distill.training.checkpoint_files import ema_group

KEPT = [0.05, 0.1]


def walk(folder, source=None, recipe=None, **changes):
    """64 steps, with a snapshot every 8, and checkpoints in between."""
    content = {
        "images": 1024,
        "ema_half_lives": [],
        "ema_lengths": KEPT,
        "ema_snapshots": 128,
        "checkpoint": {"images": 80, "minutes": None, "keep": 1},
        "optimizer": {"lr": 0.01},
        **changes,
    }
    return train(folder, recipe, source, **content)


def kept(folder):
    """Bytes of the snapshots' tensors, by step and file."""
    found = checkpoint_files.complete(folder / "stages" / "train" / "snapshots")
    return {f"{path.name}/{file.name}": file.read_bytes() for path in found for file in path.glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, walk(folder, ema_lengths=[*KEPT, 0.15])


def test_a_snapshot_is_kept_at_each_interval_though_checkpoints_are_deleted(whole):
    folder, _ = whole
    names = [f"{ema_group('student', length)}.safetensors" for length in (*KEPT, 0.15)]
    assert sorted(kept(folder)) == sorted(f"step-{8 * k:08d}/{name}" for k in range(1, 9) for name in names)
    assert [path.name for path in checkpoint_files.complete(folder / "stages/train/checkpoints")] == ["step-00000064"]


def test_steps_of_other_networks_make_no_snapshots(tmp_path):
    """The critic moves three times as often as the student: the same number of images is seen in three steps."""
    walk(tmp_path, recipe=Alternating(), images=96, ema_snapshots=32)
    found = checkpoint_files.complete(tmp_path / "stages" / "train" / "snapshots")
    images = [checkpoint_files.read_meta(path).images for path in reversed(found)]
    assert images == [32, 64, 96]


def test_kills_change_no_bit_of_the_snapshots(whole, tmp_path):
    for step in (9, 24, 41):  # after a snapshot, in one, after a checkpoint
        with pytest.raises(KilledError):
            walk(tmp_path, KilledAt(fault=step), ema_lengths=[*KEPT, 0.15])
    walk(tmp_path, ema_lengths=[*KEPT, 0.15])
    assert kept(tmp_path) == kept(whole[0])


def test_a_kill_between_checkpoint_and_snapshot_loses_no_snapshot(tmp_path, whole):
    with pytest.raises(KilledError):
        walk(tmp_path, KilledAt(fault=17), ema_lengths=[*KEPT, 0.15])
    folder = tmp_path / "stages" / "train"
    assert [each.name for each in checkpoint_files.complete(folder / "checkpoints")] == ["step-00000016"]
    checkpoint_files.remove(folder / "snapshots" / "step-00000016")  # as if the process had been killed before it
    walk(tmp_path, ema_lengths=[*KEPT, 0.15])
    assert kept(tmp_path) == kept(whole[0])


def test_another_length_is_close_to_the_one_that_was_kept_in_training(whole, tmp_path):
    folder, result = whole
    student = result.roles.networks["student"]
    names = {name for name, _ in student.named_parameters()}
    made, images = snapshots.synthesize(folder / "stages/train/snapshots", 0.15, names)
    direct = averages(result.roles)
    assert images == 1024 and made.keys() == direct[0.15].keys()
    torch.testing.assert_close(made, direct[0.15], rtol=1e-5, atol=1e-6)
    walk(tmp_path)  # the same training, without this length
    for name, tensor in snapshots.synthesize(tmp_path / "stages/train/snapshots", 0.15, names)[0].items():
        if name not in names:
            assert torch.equal(tensor, direct[0.15][name])
            continue
        apart = (direct[0.15][name] - direct[0.1][name]).norm()
        assert (tensor - direct[0.15][name]).norm() < 0.05 * apart


def test_a_damaged_snapshot_is_named(tmp_path):
    walk(tmp_path)
    folder = tmp_path / "stages" / "train" / "snapshots"
    with pytest.raises(InputError, match=r"there are no snapshots in .*/nothing yet; wait for the first one"):
        snapshots.synthesize(tmp_path / "nothing", 0.15, set())
    file = folder / "step-00000016" / f"{ema_group('student', 0.1)}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(
        InputError, match=r"snapshot .*step-00000016 is damaged \(.*: wrong checksum\), and averages of"
    ):
        snapshots.synthesize(folder, 0.15, set())


def test_frozen_weights_are_those_of_the_last_snapshot(tmp_path):
    """A buffer that changes, and weights that are not trained."""

    class Partly(FlowMatching):
        def networks(self, init):
            roles = super().networks(init)
            roles["student"].module.layers[0].requires_grad_(False)
            return roles

    result = walk(tmp_path, recipe=Partly())
    made, _ = snapshots.synthesize(tmp_path / "stages/train/snapshots", 0.2, {"layers.3.weight", "layers.3.bias"})
    student = result.roles.networks["student"].state_dict()
    for name in ("layers.0.weight", "layers.0.bias", "calls"):
        assert torch.equal(made[name], student[name])
