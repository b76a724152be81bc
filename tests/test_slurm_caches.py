"""A cache stage on a real Slurm cluster: an array makes its shards, and other stages wait for it."""

import json
import os
import signal
from pathlib import Path

import cached_runs
import pytest
import torch
from cluster import Cluster
from runs import folder_bytes
from slurm_runs import NEEDS_SLURM, command_line, end_jobs, ends, enter, finish, named
from test_slurm_workflow import process_of

from distill.core.stop import StopRequest
from distill.execution.caching import Caching
from distill.runs import jobs
from distill.spec import checks, specfile

pytestmark = [*NEEDS_SLURM, pytest.mark.long]


@pytest.fixture(scope="module")
def cluster():
    with Cluster(2) as found:
        yield found


def test_an_array_makes_the_bytes_of_one_process(capfd, cluster, tmp_path, monkeypatch):
    """While the process of one part is killed, and its job is queued again."""
    enter(cluster, tmp_path, monkeypatch)
    teacher, data = cached_runs.pipeline(tmp_path / "sd3"), cached_runs.images(tmp_path / "images")
    launch = {"threads": 1, "slurm": {"pairs_jobs": 2}}
    stages = {"solve": {**cached_runs.SOLVE, "shard": 8}}
    (tmp_path / "run.yaml").write_text(json.dumps(cached_runs.content(teacher, data, stages, launch=launch)))
    command_line(capfd, "submit", "run.yaml")
    run = named("run")
    submitted = jobs.submitted(run)
    assert [(job.stages, job.parts) for job in submitted] == [
        (["cache"], [0, 1]), (["cache"], None), (["solve"], [0]), (["solve"], None)
    ]  # fmt: skip
    array = submitted[0].id
    os.kill(cluster.wait(lambda: process_of(f"{array}_1"), 60, "a process"), signal.SIGKILL)
    finish(cluster, run, submitted[-1].id)
    assert [ends(run, f"{array}_{part}") for part in (0, 1)] == [
        [("done", False)], [("crash", True), ("done", False)]
    ]  # fmt: skip
    torch.set_num_threads(1)
    found = checks.check(specfile.load(tmp_path / "run.yaml").spec, tmp_path)
    alone = Caching.of(found, tmp_path / "alone", tmp_path / "alone")
    alone.make_all(torch.device("cpu"), StopRequest(), (0, 1))
    ours = folder_bytes(Path("runs", "caches"))
    assert {name: each for name, each in ours.items() if "shard-" not in name or ".safetensors" in name} == (
        folder_bytes(tmp_path / "alone" / "caches")
    )
    assert "run  done" in command_line(capfd, "status", "run").out
    end_jobs(cluster)
