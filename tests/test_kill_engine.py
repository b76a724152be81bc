"""Processes that train two networks, killed and stopped at random moments: the result is that of an undisturbed one."""

import random
import re
import signal
import time

import pytest
import torch
from programs import train_vector
from programs.forked import Forked
from safetensors.torch import load

from distill.core.errors import EXIT_STOPPED
from distill.runs.run_store import RunPaths, read_events
from distill.training import checkpoint

pytestmark = pytest.mark.process

IMAGES = 16 * 64  # 64 steps of the student, 192 of the loop
LAST = "step-00000192"
ALWAYS, NEVER = 16, 10**9  # images between saves


def start(folder, every=ALWAYS, ballast=0):
    return Forked(train_vector.main, folder, IMAGES, every, ballast, log=folder.with_suffix(".stderr"))


def finish(folder, every=ALWAYS, ballast=0):
    training = start(folder, every, ballast)
    assert training.end() == 0, training.said
    return training.said


def checkpoints(folder):
    return RunPaths(folder).stage("train").checkpoints


def newest(folder):
    """Step of the newest checkpoint; 0 before the first."""
    return max((int(path.name.removeprefix("step-")) for path in checkpoint.complete(checkpoints(folder))), default=0)


def content(folder):
    """The newest checkpoint's tensor files, byte for byte."""
    last = checkpoint.complete(checkpoints(folder))[0]
    return last.name, {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(folder, NEVER)
    name, files = content(folder)
    assert name == LAST and len(files) == 6  # two networks, two optimizers, two averages
    return files


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def test_kill_9_at_ten_random_moments_changes_no_bit(folder, undisturbed):
    chance = random.Random(2)
    while_saving = 0
    for _ in range(10):
        target = newest(folder) + 3 * chance.randint(1, 5)
        training = start(folder)
        training.wait_until(lambda target=target: newest(folder) >= target)
        time.sleep(chance.uniform(0, 0.03))
        training.send(signal.SIGKILL)
        assert training.end() == -signal.SIGKILL
        while_saving += any("." in path.name for path in checkpoints(folder).iterdir())  # being written, or removed
    assert while_saving >= 1
    said = finish(folder)
    assert "warning" not in said
    assert content(folder) == (LAST, undisturbed)
    assert sorted(path.name for path in checkpoints(folder).iterdir()) == ["step-00000189", LAST]
    resumed = [event["step"] for event in read_events(RunPaths(folder)) if event["event"] == "resumed"]
    assert len(resumed) == 10 and resumed == sorted(resumed)


def test_kill_9_while_training_runs_ahead_of_the_disk_changes_no_bit(folder, undisturbed):
    """A large state, saved every 16 steps of the student: steps are made while it is written, and lost with it."""
    ballast, chance, ahead = 2_000_000, random.Random(3), 0

    def asked():
        return int((folder / "asked").read_text().split()[-1])

    def written():
        """Step of the checkpoint that is being written; None: none is."""
        there = [path.name for path in checkpoints(folder).iterdir()] if checkpoints(folder).is_dir() else []
        return next((int(found[1]) for name in there if (found := re.fullmatch(r"\.step-0*(\d+)\.tmp-.+", name))), None)

    for _ in range(3):
        before = newest(folder)
        training = start(folder, 16 * ALWAYS, ballast)
        training.wait_until(lambda before=before: before < (written() or 0) < asked())
        time.sleep(chance.uniform(0, 0.02))
        training.send(signal.SIGKILL)
        assert training.end() == -signal.SIGKILL
        if (number := written()) is not None:
            assert newest(folder) < number
            ahead += asked() > number
    assert ahead >= 1
    assert "warning" not in finish(folder, 16 * ALWAYS, ballast)
    last = checkpoint.latest(checkpoints(folder), pytest.fail)
    assert last.path.name == LAST
    for name in undisturbed:
        group = name.removesuffix(".safetensors")
        tensors = last.tensors(group)
        heavy, calls = tensors.pop("ballast", None), tensors.get("calls")
        assert (heavy is None) == (group in ("network.critic", "optimizer.critic", "optimizer.student"))
        assert heavy is None or (heavy == calls).all()
        expected = load(undisturbed[name])
        assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_signals_finish_the_step_save_and_leave_with_75(folder, undisturbed):
    """Nothing but the signal saves here."""
    run = RunPaths(folder)
    steps = [0]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        before = sum(1 for _ in read_events(run))
        training = start(folder, NEVER)
        training.wait_until(lambda before=before: sum(1 for _ in read_events(run)) > before + 4)
        training.send(number)
        assert training.end() == EXIT_STOPPED == 75, training.said
        last = checkpoint.latest(checkpoints(folder), pytest.fail)
        assert re.search(rf"stopped by {number.name}; saved: {last.path}\n", training.said)
        assert steps[-1] < last.meta.step < 192
        steps.append(last.meta.step)
    finish(folder, NEVER)
    assert content(folder) == (LAST, undisturbed)


def test_a_damaged_newest_checkpoint_costs_some_steps_and_no_bit(folder, undisturbed):
    training = start(folder)
    training.wait_until(lambda: newest(folder) >= 30)
    training.send(signal.SIGTERM)
    assert training.end() == EXIT_STOPPED
    last, before = checkpoint.complete(checkpoints(folder))
    moments = last / "optimizer.critic.safetensors"
    moments.write_bytes(moments.read_bytes()[:-7])
    said = finish(folder)
    reason = r"optimizer\.critic\.safetensors: [\d,]+ bytes instead of [\d,]+"
    assert re.search(rf"warning: checkpoint {last} is damaged \({reason}\); going back to {before.name}\n", said)
    assert content(folder) == (LAST, undisturbed)
