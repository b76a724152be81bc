"""Saving during training: what is copied, what waits for what, and how a failure is reported."""

import json
import re
import shutil
import struct
import threading
import time
import weakref

import pytest
import torch
from programs.train_vector import FlowMatching, Ring, train
from safetensors.torch import load, save

from distill.core.errors import RunError, Stopped
from distill.core.stop import StopRequest
from distill.runs.run_store import RunPaths, read_events
from distill.spec.model import CheckpointSpec
from distill.training.checkpoint import Checkpoints, complete, latest
from distill.training.parts import RankParts
from distill.training.saving import Image, Saver

BALLAST = 1_000_000  # elements: three groups hold it, 12 MB
ALL = {"images": 16, "minutes": None, "keep": 100}  # a save after every step


def mixed():
    tied = torch.randn(5)
    return {
        "h": torch.randn(2, 3).to(torch.bfloat16), "a/ü\"": torch.arange(3), "d": torch.randn(()).double(),
        "strided": torch.randn(4, 2).T, "i": torch.arange(4, dtype=torch.int32), "none": torch.ones(2, 0),
        "flag": torch.tensor([True, False, True]), "one": tied, "two": tied, "halves": torch.randn(3).half(),
    }  # fmt: skip


def test_an_image_has_the_bytes_that_the_library_writes():
    """Also when it is filled again."""
    first, second = mixed(), mixed()
    image = Image(first)
    for tensors in (first, second):
        image.fill(tensors)
        assert bytes(image.content) == save({name: tensor.clone().contiguous() for name, tensor in tensors.items()})
        loaded = load(bytes(image.content))
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    # Where the data begins, tensors are copied at full speed.
    (length,) = struct.unpack("<Q", bytes(image.content[:8]))
    assert torch.frombuffer(image.content, dtype=torch.uint8, offset=8 + length).data_ptr() % 64 == 0
    empty = Image({})
    empty.fill({})
    assert bytes(empty.content) == save({})


def test_an_image_fits_its_own_kind_alone():
    tensors = {"w": torch.ones(2, 3), "n": torch.ones(())}
    image = Image(tensors)
    assert image.fits({"n": torch.zeros(()), "w": torch.zeros(3, 2).T})
    for other in ({"w": torch.ones(3, 2)}, {"w": torch.ones(2, 3).half()}, {"n": torch.ones(1)}, {"m": torch.ones(1)}):
        assert not image.fits({**tensors, **other})
    assert not image.fits({"w": torch.ones(2, 3)})


def test_memory_is_kept_between_saves_while_it_fits(tmp_path):
    done, alive = [], []
    saver = Saver(Checkpoints(tmp_path, CheckpointSpec(images=1), {}, {}, pytest.fail), done.append)
    for step, size in enumerate((4, 4, 5), 1):
        groups = {"network": {"w": torch.full((3,), float(step))}, "optimizer": {"w": torch.full((size,), float(step))}}
        saver.save(step, step, [(name, RankParts(tensors)) for name, tensors in groups.items()])
        saver.finish()
        last = latest(tmp_path, pytest.fail)
        for name, tensors in groups.items():
            assert torch.equal(last.tensors(name)["w"], tensors["w"])
        if step == 1:
            alive = [weakref.ref(image) for image in saver.images.values()]
        assert sum(image() is not None for image in alive) == {1: 2, 2: 2, 3: 1}[step], "that of another size goes"
    assert [saved.step for saved in done] == [1, 2, 3]


def test_no_memory_for_the_copy_is_one_message(tmp_path):
    saver = Saver(Checkpoints(tmp_path, CheckpointSpec(images=1), {}, {}, pytest.fail), pytest.fail)
    huge = torch.zeros(1).expand(1 << 60)
    with pytest.raises(
        RunError, match=r"not enough memory on this host for a copy of a rank's part of the checkpoint, .*: \S+ TB more"
    ):
        saver.save(1, 1, [("network", RankParts({"w": huge}))])
    assert complete(tmp_path) == []


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def saving():
    return any(thread.name == "saving" for thread in threading.enumerate())


class Watching(Ring):
    """At each step, notes what lies in the folder of checkpoints; `then` is called with that."""

    def __init__(self, folder, then=lambda step, there: None):
        super().__init__()
        self.folder, self.then, self.seen = folder / "stages/train/checkpoints", then, {}

    def batch(self, step, rows):
        while saving() and not (self.folder.exists() and being_written(names(self.folder))):
            time.sleep(0.0005)  # its thread begins
        self.seen[step] = names(self.folder) if self.folder.exists() else []
        self.then(step, self.seen[step])
        return super().batch(step, rows)


def being_written(there):
    return [int(found[1]) for name in there if (found := re.fullmatch(r"\.step-0*(\d+)\.tmp-.+", name))]


def saves(folder):
    return [event for event in read_events(RunPaths(folder)) if event["event"] == "saved"]


def test_training_goes_on_while_a_checkpoint_is_written_and_each_is_of_its_own_step(tmp_path):
    """Saves are due after every step: none is left out, and no two are written at once."""
    source = Watching(tmp_path)
    train(tmp_path, FlowMatching(ballast=BALLAST), source, checkpoint=ALL)
    written = {step: being_written(there) for step, there in source.seen.items()}
    assert any(number == step for step, numbers in written.items() for number in numbers), "it was not waited for"
    assert all(len(numbers) <= 1 for numbers in written.values())
    folder = source.folder
    assert names(folder) == [f"step-{step:08d}" for step in range(1, 9)]
    for path in complete(folder):
        meta = json.loads((path / "meta.json").read_text())
        tensors = load((path / "network.student.safetensors").read_bytes())
        assert meta["images"] == 16 * meta["step"]
        assert (tensors["ballast"] == meta["step"]).all(), "no later step is in it"
    events = saves(tmp_path)
    assert [event["step"] for event in events] == list(range(1, 9))
    assert all(0 < event["standstill"] <= event["seconds"] for event in events)
    assert latest(folder, pytest.fail).meta.step == 8


def test_saves_that_are_rare_do_not_wait(tmp_path):
    """Steps are made while one is written; the next begins when it is due."""
    source = Watching(tmp_path)
    train(
        tmp_path, FlowMatching(ballast=4 * BALLAST), source, images=16 * 64,
        checkpoint={"images": 16 * 32, "minutes": None, "keep": 2},
    )  # fmt: skip
    assert any(step > number for step, there in source.seen.items() for number in being_written(there))
    assert [event["step"] for event in saves(tmp_path)] == [32, 64]


def test_an_error_in_training_waits_for_the_save_that_is_written(tmp_path):
    class WrongError(Exception):
        pass

    def fail(step, there):
        if being_written(there):
            raise WrongError

    source = Watching(tmp_path, fail)
    with pytest.raises(WrongError):
        train(tmp_path, FlowMatching(ballast=BALLAST), source, checkpoint=ALL)
    [number] = being_written(source.seen[max(source.seen)])
    assert latest(source.folder, pytest.fail).meta.step == number
    assert saves(tmp_path)[-1]["step"] == number
    assert not being_written(names(source.folder))


def test_a_second_interrupt_waits_for_nothing(tmp_path):
    def interrupt(step, there):
        if being_written(there):
            raise KeyboardInterrupt

    source = Watching(tmp_path, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, FlowMatching(ballast=4 * BALLAST), source, checkpoint=ALL)
    assert being_written(names(source.folder)), "as a kill would leave it"
    until = time.monotonic() + 60
    while being_written(names(source.folder)):  # its thread would write on into what is cleared next
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_stop_names_a_checkpoint_that_is_on_the_disk(tmp_path):
    """A signal comes while one is being written: another one follows it."""
    stop = StopRequest()

    def ask(step, there):
        if being_written(there):
            stop.signal = "the test"

    source = Watching(tmp_path, ask)
    with pytest.raises(Stopped) as caught:
        train(tmp_path, FlowMatching(ballast=BALLAST), source, stop=stop, checkpoint=ALL)
    last = latest(source.folder, pytest.fail)
    assert last.meta.step == max(source.seen) + 1
    assert str(caught.value) == f"stopped by the test; saved: {last.path}"
    assert saves(tmp_path)[-1]["step"] == last.meta.step


@pytest.fixture
def failing(tmp_path):
    """A source that lets every save end before the next step, and takes the folder of checkpoints away at step 5;
    where the checkpoints went.
    """
    aside = tmp_path / "aside"

    class Taking(Watching):
        def batch(self, step, rows):
            while saving():
                time.sleep(0.001)
            if step == 5:
                shutil.move(self.folder, aside)
                self.folder.write_text("no folder")
            self.seen[step] = []
            return Ring.batch(self, step, rows)

    return Taking(tmp_path), aside


RARE = {"images": 64, "minutes": None, "keep": 100}


def test_a_save_that_fails_is_named_at_the_next_step(tmp_path, failing):
    """Not only when the next one is due, after step 12."""
    source, aside = failing
    with pytest.raises(RunError) as caught:
        train(tmp_path, source=source, images=16 * 64, checkpoint=RARE)
    step = source.folder / "step-00000008"
    assert str(caught.value) == (
        f"cannot save checkpoint {step}: File exists; last good checkpoint: {source.folder}/step-00000004"
    )
    assert max(source.seen) == 8
    assert [event["step"] for event in saves(tmp_path)] == [4]
    assert latest(aside, pytest.fail).meta.step == 4


def test_what_ends_training_is_not_hidden_by_a_save_that_fails(tmp_path, failing, capsys):
    source, _ = failing
    source.fault = 8
    with pytest.raises(RunError, match=r"^step 8, turn 0, .* Last good checkpoint: \S+/step-00000004; lower"):
        train(tmp_path, source=source, images=16 * 64, checkpoint=RARE)
    assert re.search(r"cannot save checkpoint \S+/step-00000008: File exists", "".join(capsys.readouterr()))
