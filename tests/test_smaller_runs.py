"""Runs of smaller students: trained on pairs, evaluated, stopped and resumed, as teachers, and by every recipe."""

import json
import signal

import pytest
import test_teacher_dit as dit
import test_teacher_recipes as teachers
import torch
from commands import command
from latent import write
from latent_runs import RECIPES, TRAIN, content, images, run
from runs import distill, kill, start, wait_for
from safetensors.torch import load_file

from distill.exchange import student_card
from distill.runs import results
from distill.runs.run_store import RunPaths

pytestmark = pytest.mark.long

WEIGHTS = "diffusion_pytorch_model.safetensors"
PAIRS = {"kind": "pairs", "count": 64, "block": 32, "shard": 32, "steps": 4, "solver": "heun"}
SMALL = {
    "kind": "train", "recipe": "reflow/reflow", "pairs": "pairs", "student": {"config": {"num_layers": 2}},
    "images": 3200, "batch_size": 32, "optimizer": {"lr": 2e-3}, "checkpoint": {"images": 800, "minutes": None},
}  # fmt: skip
AGAIN = {**TRAIN, "recipe": "reflow/reflow", "teacher": "small", "pairs": "more"}
STAGES = {
    "pairs": PAIRS,
    "small": SMALL,
    "more": {**PAIRS, "teacher": "small", "count": 32},
    "again": AGAIN,
    "smallest": {**AGAIN, "init": "again", "student": {"config": {"num_attention_heads": 1}}},
    "evaluate": {
        "kind": "evaluate", "students": {"small": [1, 2], "again": [1], "smallest": [1]}, "samples": 32, "block": 32,
        "teacher_steps": [1], "fine_steps": 4,
    },
}  # fmt: skip


def spec(folder, **stages):
    """The file of a spec with a DiT of five blocks as its teacher."""
    place = str(write(folder / "dit", dit.pipeline(num_embeds_ada_norm=3, num_layers=5)))
    made = {"name": "run", "teacher": {"path": place, "size": [16, 16]}, "stages": stages}
    if "evaluate" in stages:
        made["data"] = images(folder / "data", 3, 16, 16)
    (folder / "spec.yaml").write_text(json.dumps(made))
    return folder / "spec.yaml"


def blocks(folder):
    config = json.loads((folder / "transformer" / "config.json").read_text())
    return config["num_layers"], config["num_attention_heads"]


def test_a_smaller_student_is_planned_trained_evaluated_and_sampled(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec(tmp_path, **STAGES)
    done = command(capfd, "plan", "spec.yaml")
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith("student of ")]
    assert lines == [
        "student of 'small': 19,952 parameters (teacher: 47,840), 19,952 of them with its weights; transformer_blocks "
        "from its 0, 4",
        "student of 'smallest': 7,432 parameters (teacher: 19,952), 0 of them with its weights",
    ]
    planned = json.loads(command(capfd, "plan", "spec.yaml", "--json").out)["students"]
    assert planned["small"] == {
        "teacher": 47840, "student": 19952, "copied": 19952, "blocks": {"transformer_blocks": [0, 4]},
    }  # fmt: skip
    assert not (tmp_path / "runs" / "run").exists()
    done = command(capfd, "run", "spec.yaml")
    assert done.code == 0, done.err
    events = [json.loads(each) for path in (tmp_path / "runs/run/events").iterdir() for each in path.open()]
    losses = [
        each["logs"]["loss"] for each in events if each.get("label") == "small" and "loss" in each.get("logs", {})
    ]
    assert losses[-1] < 0.5 * losses[0]
    students = tmp_path / "runs" / "run" / "students"
    assert [blocks(students / name) for name in ("small", "again", "smallest")] == [(2, 2), (2, 2), (2, 1)]
    found = results.load_results(RunPaths(tmp_path / "runs" / "run").stage("evaluate"))
    assert {row.network for row in found.rows} == {"teacher", "small", "again", "smallest"}
    done = command(capfd, "export", "run", "small", "--out", "exported")
    assert done.code == 0, done.err
    ours, theirs = (load_file(each / "transformer" / WEIGHTS) for each in (students / "small", tmp_path / "exported"))
    assert all(torch.equal(each, theirs[name]) for name, each in ours.items())
    done = command(capfd, "sample", "run/small", "--out", "x.safetensors", "--count", "3")
    assert done.code == 0, done.err
    samples = load_file(tmp_path / "x.safetensors")["samples"]
    assert len(samples) == 3 and samples.isfinite().all()


def test_a_kill_and_a_resume_change_no_bit(tmp_path):
    students = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        spec(folder, pairs=PAIRS, small=SMALL)
        if name == "whole":
            done = distill("run", "spec.yaml", cwd=folder)
            assert done.returncode == 0, done.stderr
        else:
            process = start("run", "spec.yaml", cwd=folder, log=folder / "log")
            checkpoints = folder / "runs/run/stages/small/checkpoints"
            assert wait_for(lambda c=checkpoints: any(c.glob("step-*")), process)
            kill(process, signal.SIGKILL)
            done = distill("run", "run", "--resume", cwd=folder)
            assert done.returncode == 0, done.stderr
        students.append(load_file(folder / "runs/run/students/small/transformer" / WEIGHTS))
    assert all(torch.equal(each, students[1][name]) for name, each in students[0].items())


CONFIGS = {"sdxl": {"layers_per_block": 2}, "sd 3": {"num_layers": 1}, "wan 2.2": {"num_attention_heads": 1}}


A_FEW = ["reflow/reflow", "reflow/caf", "shortcut/meanflow", "score/dmd2"]
RUNS = [("sd 3", each) for each in RECIPES] + [(teacher, each) for teacher in ("sdxl", "wan 2.2") for each in A_FEW]


@pytest.mark.parametrize(("teacher", "recipe"), RUNS)
def test_every_recipe_trains_a_smaller_student(tmp_path, teacher, recipe):
    tiny, name = teachers.TEACHERS[teacher], recipe.partition("/")[2]
    data = teachers.clips() if len(tiny.size) == 3 else None
    given = {"kind": "digits"} if data is not None else images(tmp_path / "data", 3, *tiny.size)
    made = content(tiny.write(tmp_path), given, [recipe])
    stages = made["stages"]
    first = stages[name].get("init", name)  # the first student is the smaller one
    stages[first] = {**stages[first], "student": {"config": CONFIGS[teacher]}}
    done = run(tmp_path, made, data)
    folder = done.student(name)
    assert student_card.verify(folder).images == 12
    part = "unet" if teacher == "sdxl" else "transformer"
    config = json.loads((folder / part / "config.json").read_text())
    assert {key: config[key] for key in CONFIGS[teacher]} == CONFIGS[teacher]
