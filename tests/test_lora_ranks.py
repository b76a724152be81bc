"""LoRA students of two processes under ZeRO 2, whose networks share one base: as of one, and resumed to the bit."""

import os
import signal
from pathlib import Path

import pytest
import test_teacher_sd3 as sd3
import yaml
from latent import write, write_conditions
from latent_runs import images
from runs import distill, folder_bytes, start, wait_for

from distill.runs.run_store import RunPaths
from distill.training.checkpoint_files import Checkpoint, Meta

pytestmark = [pytest.mark.process, pytest.mark.long]

TRAIN = {
    "kind": "train", "images": 24, "batch_size": 4, "ema_half_lives": [8], "optimizer": {"lr": 1e-4, "eps": 1e-3},
    "checkpoint": {"images": 4, "minutes": None},
}  # fmt: skip
LORA = {"student": {"rank": 4, "alpha": 8}}
STAGES = {
    "cut": {**TRAIN, "recipe": "shortcut/shortcut", "options": {"target_decay": 0.5}, "lora": LORA},
    "match": {
        **TRAIN, "recipe": "score/dmd2", "images": 8, "init": "cut", "precision": "bf16",
        "lora": {**LORA, "critic": {"rank": 2, "targets": ["to_q", "to_v"]}},
    },
}  # fmt: skip
TWO = ("launch.procs=2", "launch.zero_stage=2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    rows = write_conditions(folder / "conditions.safetensors", sd3.embeddings(2))
    write(folder / "teacher", sd3.pipeline(version="3.5"))
    spec = {
        "name": "one", "teacher": {"path": "teacher", "size": [16, 16], "conditions": rows}, "stages": STAGES,
        "data": images(folder / "data", 3, 16, 16), "launch": {"device": "cpu", "threads": 1},
    }  # fmt: skip
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    for name, changes in (("one", ()), ("two", TWO)):
        done = distill("run", "spec.yaml", "--name", name, *changes, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def newest(place, name, stage):
    return max((place / "runs" / name / "stages" / stage / "checkpoints").glob("step-*"))


def tensors(folder):
    """All tensors of a checkpoint, as GROUP/NAME, whichever ranks wrote them."""
    found = Checkpoint(folder, Meta.model_validate_json((folder / "meta.json").read_bytes()))
    return {f"{group}/{key}": each for group in found.groups.split(", ") for key, each in found.tensors(group).items()}


def test_two_processes_train_as_one(place):
    ours, theirs = (tensors(newest(place, name, "cut")) for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert {key.partition("/")[0] for key in ours} == {
        "network.student", "network.target", "optimizer.student", "ema.student.8.0"
    }  # fmt: skip
    assert not any("base_layer" in key or "pos_embed" in key for key in ours)
    for key, each in theirs.items():
        assert (ours[key] - each).norm() <= 1e-3 * each.norm() + 1e-9, key


def test_a_killed_rank_costs_no_bit(place):
    process = start("run", "spec.yaml", *TWO, "--name", "killed", cwd=place, log=place / "killed.log")
    run = RunPaths(place / "runs" / "killed")
    assert wait_for(lambda: (run.stage("cut").checkpoints / "step-00000003").exists(), process)
    rank, _ = sorted(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    os.kill(rank, signal.SIGKILL)
    assert process.end(60) == 128 + signal.SIGKILL
    done = distill("run", "killed", "--resume", cwd=place)
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        ours, theirs = (folder_bytes(RunPaths(place / "runs" / name).student(stage)) for name in ("killed", "two"))
        assert ours == theirs
        ours, theirs = (folder_bytes(newest(place, name, stage)) for name in ("killed", "two"))
        assert ours.keys() == theirs.keys()
        assert all(each == theirs[name] for name, each in ours.items() if name.endswith(".safetensors"))
