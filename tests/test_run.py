"""A small run on vectors from its spec to its students, by the real command, with a recipe of the user."""

import json

import numpy as np
import pytest
from PIL import Image
from runs import distill, folder_bytes

from distill.core.records import read_json
from distill.exchange import student_card
from distill.runs.run_store import RunPaths, read_events
from distill.spec import presets

SPEC = """
name: one
teacher: {kind: gaussian, mean: [1, 2], std: [0.5, 0.25]}
stages:
  pairs: {kind: pairs, count: 96, block: 32, shard: 64, steps: 4}
  straight:
    kind: train
    recipe: ./mine.py
    options: {distance: pseudo_huber}
    network: {kind: mlp, width: 8, depth: 1}
    pairs: pairs
    images: 96
    batch_size: 32
    ema_half_lives: [32]
    export: 32
"""

ON_IMAGES = """
name: one
data: {kind: images, path: images, size: 8, channels: 1}
stages:
  teach:
    kind: train
    recipe: pretrain/flow_matching
    network: {kind: unet, channels: [8], norm_groups: 4}
    images: 48
    batch_size: 4
    checkpoint: {images: 4}
"""


@pytest.mark.process
@pytest.mark.parametrize(("code", "ends"), [(0, 1), pytest.param(7, 7, marks=pytest.mark.long)])
def test_a_process_that_ends_in_the_middle_without_a_word_is_a_failure(tmp_path, code, ends):
    text = (presets.folder().parent / "reflow" / "reflow.py").read_text()
    leaves = f"    def loss(*_):\n        __import__('os')._exit({code})\n\n    def other("
    (tmp_path / "mine.py").write_text(text.replace("    def loss(", leaves, 1))
    (tmp_path / "s.yaml").write_text(SPEC)
    done = distill("run", "s.yaml", cwd=tmp_path)
    message = (
        f"a process exited with code {code} before its stage was done (does a recipe or library call exit or os._exit?)"
    )
    run = tmp_path / "runs" / "one"
    said = f"error: run 'one': {message}; what it saved is intact; resume with: distill run {run} --resume"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (ends, said)
    *_, last = read_events(RunPaths(run))
    assert (last["event"], last["message"]) == ("failed", message)


@pytest.mark.process
@pytest.mark.long
def test_a_run_that_met_a_damaged_image_goes_on_when_one_may_be_skipped(tmp_path):
    """That the image is damaged turns out when it is first decoded. What was trained until then is kept."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for i, each in enumerate(noise):
        Image.fromarray(each).save(tmp_path / "images" / f"{i:02}.png")
    path = tmp_path / "images" / "20.png"
    content = bytearray(path.read_bytes())
    content[60:70] = bytes(10)  # in the middle: the header and the end are fine
    path.write_bytes(content)
    (tmp_path / "s.yaml").write_text(ON_IMAGES)
    env = {"OMP_NUM_THREADS": "1"}
    done = distill("run", "s.yaml", cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert "1 of 24 images cannot be decoded" in done.stderr
    assert "or increase data.max_unreadable (now 0)" in done.stderr
    done = distill("run", "one", "--resume", "data.max_unreadable=1", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    run = RunPaths(tmp_path / "runs" / "one")
    (changed,) = [event for event in read_events(run) if event["event"] == "spec changed"]
    assert changed["changes"] == ["data.max_unreadable: 0 -> 1"]
    assert student_card.verify(run.student("teach")).images == 48


@pytest.mark.process
@pytest.mark.long  # test_outside has a recipe of another package
def test_a_run_with_a_recipe_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text((presets.folder().parent / "reflow" / "reflow.py").read_text())
    (tmp_path / "s.yaml").write_text(SPEC)
    env = {"OMP_NUM_THREADS": "1"}
    done = distill("run", "s.yaml", cwd=tmp_path, env=env, fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "run 'one' in runs/one: pairs, straight",
        "run                  runs/one",
        "student straight     runs/one/students/straight",
    ]
    run = RunPaths(tmp_path / "runs" / "one")
    kinds = [event["event"] for event in read_events(run) if event["event"] != "progress"]
    assert kinds[:2] == ["created", "started"]
    assert kinds[-1] == "finished"
    assert read_json(run.env)["threads"] == 1
    assert (run.root / "mine.py").read_text() == (tmp_path / "mine.py").read_text()
    assert not run.running.exists()
    assert json.loads(distill("list", "--json", cwd=tmp_path).stdout)[0]["state"] == "done"

    # what is done is not done again, from wherever it is asked, the spec file gone or not
    (tmp_path / "mine.py").unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    before = folder_bytes(run.root)
    done = distill("run", str(run.root), "--resume", cwd=elsewhere)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "all stages of run 'one' are done")
    assert folder_bytes(run.root) == before


@pytest.mark.long
@pytest.mark.process
def test_what_is_gone_is_made_again_to_the_same_bytes(tmp_path):
    (tmp_path / "mine.py").write_text((presets.folder().parent / "reflow" / "reflow.py").read_text())
    (tmp_path / "s.yaml").write_text(SPEC)
    env = {"OMP_NUM_THREADS": "1"}
    done = distill("run", "s.yaml", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    run = RunPaths(tmp_path / "runs" / "one")
    (tmp_path / "mine.py").unlink()

    # a change of launch is noted; a stage whose result is gone is computed again, to the same bytes,
    # and the pairs that it needs are made again where one of their files is gone
    student, pairs = folder_bytes(run.student("straight")), folder_bytes(run.stage("pairs").pairs)
    run.stage("straight").done.unlink()
    (run.stage("pairs").pairs / "shard-00001.safetensors").unlink()
    done = distill("run", "one", "launch.micro_batch=32", "--resume", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "the pairs of stage 'pairs' are missing or damaged, and still needed: they are made again",
        "run 'one' in runs/one: pairs, straight",
    ]
    assert folder_bytes(run.student("straight")) == student
    assert folder_bytes(run.stage("pairs").pairs) == pairs
    (changed,) = [event for event in read_events(run) if event["event"] == "spec changed"]
    assert changed["changes"] == ["launch.micro_batch: null -> 32"]

    # the resolved spec is itself a spec: the same digest, the same student
    done = distill("run", "runs/one/spec.yaml", "--name", "two", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    two = RunPaths(tmp_path / "runs" / "two")
    assert folder_bytes(two.student("straight")) == student
    digests = [next(read_events(each))["digest"] for each in (run, two)]
    assert digests[0] == digests[1]


@pytest.mark.process
def test_two_starts_of_one_name(tmp_path):
    """Whoever comes second is told so, and disturbs nothing."""
    from runs import start

    (tmp_path / "mine.py").write_text((presets.folder().parent / "reflow" / "reflow.py").read_text())
    (tmp_path / "s.yaml").write_text(SPEC)
    logs = [tmp_path / f"log-{i}" for i in range(2)]
    codes = [process.end(300) for process in [start("run", "s.yaml", cwd=tmp_path, log=log) for log in logs]]
    assert sorted(codes) == [0, 2], [log.read_text() for log in logs]
    for code, log in zip(codes, logs, strict=True):
        if code == 2:
            assert "there is a run 'one' in" in log.read_text()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]
