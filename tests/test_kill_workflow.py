"""A whole workflow, killed once in every stage: the students are byte-identical to those of an uninterrupted run."""

import os
import signal
import time

import pytest
from runs import distill, folder_bytes, kill, start, wait_for

from distill.runs.run_store import RunPaths, read_events

pytestmark = pytest.mark.process

SMALL = [
    "stages.teach.images=3840",
    "stages.teach.optimizer.warmup_images=0",
    "stages.teach.network.channels=[8, 16]",
    "stages.teach.checkpoint.images=640",
    "stages.pairs.count=1000",
    "stages.pairs.shard=250",
    "stages.reflow.images=2560",
    "stages.reflow.optimizer.warmup_images=0",
    "stages.reflow.checkpoint.images=640",
    "stages.one_step.images=2560",
    "stages.one_step.optimizer.warmup_images=0",
    "stages.one_step.checkpoint.images=640",
    "stages.evaluate.samples=500",
    "stages.evaluate.teacher_steps=[1, 2]",
    "stages.evaluate.fine_steps=2",
]
STAGES = ("teach", "pairs", "reflow", "one_step", "evaluate")


def under_way(run, stage):
    """Whether a stage has begun to leave something behind (a checkpoint, a shard, a first row)."""
    paths = run.stage(stage)
    kept = {"pairs": paths.pairs.glob("shard-*"), "evaluate": paths.root.glob("*")}
    return any(kept.get(stage, paths.checkpoints.glob("step-*")))


@pytest.mark.long  # in `make test`, test_reflow_command kills a run and resumes it
def test_killed_in_each_stage(tmp_path):
    whole = distill("run", "digits", *SMALL, "--name", "whole", "--store", "runs", cwd=tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr

    killed = RunPaths(tmp_path / "runs" / "killed")
    log, hit = tmp_path / "log", []
    for number, stage in enumerate(STAGES):
        again = ["run", "killed", "--resume"] if number else ["run", "digits", *SMALL, "--name", "killed"]
        process = start(*again, "--store", "runs", cwd=tmp_path, log=log)
        assert wait_for(lambda stage=stage: under_way(killed, stage), process), log.read_text()
        kill(process)
        if not killed.stage(stage).done.exists():
            hit.append(stage)
    assert len(hit) >= 4 and {"teach", "pairs", "evaluate"} <= set(hit), f"killed in {hit} only; the rest was too fast"
    end = distill("run", "killed", "--resume", "--store", "runs", cwd=tmp_path)
    assert end.returncode == 0, end.stdout + end.stderr

    for stage in ("teach", "reflow", "one_step"):
        expected = folder_bytes(tmp_path / "runs" / "whole" / "students" / stage)
        found = folder_bytes(killed.student(stage))
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == [], stage
    assert folder_bytes(killed.stage("pairs").pairs) == folder_bytes(
        tmp_path / "runs" / "whole" / "stages" / "pairs" / "pairs"
    )


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(each, marks=pytest.mark.long) for each in (signal.SIGTERM, signal.SIGUSR1))],
)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    run, log = RunPaths(tmp_path / "runs" / "one"), tmp_path / "log"
    process = start("run", "digits", *SMALL, "stages.teach.images=1280000", "--name", "one", "--store", "runs",
                    cwd=tmp_path, log=log)  # fmt: skip
    assert wait_for(lambda: any(run.stage("teach").checkpoints.glob("step-*")), process), log.read_text()
    assert kill(process, number) == 75, log.read_text()
    assert "--resume" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert any(run.stage("teach").checkpoints.glob("step-*"))


def test_whoever_started_it_is_killed_and_so_is_who_read_its_lines(tmp_path):
    run, pipe = RunPaths(tmp_path / "runs" / "one"), tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    process = start("run", "digits", *SMALL, "stages.teach.images=1280000", "stages.teach.checkpoint.images=1280000",
                    "--name", "one", "--store", "runs", cwd=tmp_path, log=pipe)  # fmt: skip

    def last():
        return list(read_events(run))[-1]

    assert wait_for(lambda: run.events.is_dir() and last()["event"] == "progress", process)
    os.close(reader)
    process.send(signal.SIGKILL)
    process.end(30)
    deadline = time.monotonic() + 60
    while last()["event"] != "stopped" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert last()["event"] == "stopped", last()
    assert "saved" in last()["message"]
    assert len(list(run.stage("teach").checkpoints.glob("step-*"))) == 1
