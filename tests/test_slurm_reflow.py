"""Rounds of reflow on a real Slurm cluster of two nodes: the same students as on one machine; job arrays make pairs."""

from pathlib import Path

import pytest
from cluster import Cluster
from commands import snapshot
from runs import distill, folder_bytes
from slurm_runs import MIXTURE, NEEDS_SLURM, command_line, end_jobs, enter, finish, last_job, named, queue

from distill.reports import rounds_table
from distill.runs import jobs, results
from distill.runs.run_store import RunPaths

pytestmark = NEEDS_SLURM

ROUNDS = ["reflow", "mix.yaml", "--rounds", "2"]
SLURM = ["--slurm", "--nodes=2", "--pairs-jobs=2", "--partition=batch"]


@pytest.fixture(scope="module")
def cluster():
    with Cluster(2) as found:
        yield found


@pytest.fixture(autouse=True)
def here(cluster, tmp_path, monkeypatch):
    yield enter(cluster, tmp_path, monkeypatch)
    end_jobs(cluster)


def test_what_would_be_submitted(capfd, cluster, here):
    before = snapshot(here)
    done = command_line(capfd, *ROUNDS, *SLURM, "--dry-run")
    assert snapshot(here) == before and queue(cluster) == []
    lines = [line.split() for line in done.out.splitlines()]
    assert ["solve-2.parts", "array", "of", "2", "1", "x", "1", "reflow-1"] in lines
    assert ["reflow-2", "reflow-2", "2", "x", "1", "reflow-1,", "solve-2"] in lines


def test_options_of_the_queue_are_checked(capfd, here):
    before = snapshot(here)
    done = command_line(capfd, *ROUNDS, "--slurm", "--partition=btach", code=2)
    assert done.err.startswith(
        "error: launch.slurm.partition: 'btach' is not a partition for distill jobs; did you mean"
    )
    done = command_line(capfd, *ROUNDS, "--slurm", "--pairs-jobs=9", code=2)
    assert "launch.slurm.pairs_jobs: 9 jobs given, but stage 'solve' has only 8 shards" in done.err
    assert snapshot(here) == before


@pytest.mark.long
def test_rounds_on_two_nodes_make_the_students_of_one_machine(capfd, cluster, here):
    (here / "local").mkdir()
    (here / "local" / "mix.yaml").write_text(MIXTURE)
    submitted = command_line(capfd, *ROUNDS, *SLURM).out
    assert "array of 2" in submitted
    run = named("mix")
    assert [(job.stages, job.parts) for job in jobs.submitted(run)] == [
        (["solve-1"], [0, 1]), (["solve-1"], None), (["reflow-1"], None), (["evaluate-1"], None),
        (["solve-2"], [0, 1]), (["solve-2"], None), (["reflow-2"], None), (["evaluate-2"], None), (["evaluate"], None),
    ]  # fmt: skip
    again = command_line(capfd, *ROUNDS, *SLURM, "--resume").out
    assert "nothing to submit for run 'mix': its unfinished stages are already queued or running\n" in again
    local = distill(*ROUNDS, "--procs=2", cwd=here / "local")  # meanwhile, by as many processes
    assert local.returncode == 0, local.stderr
    finish(cluster, run, last_job(run))
    other = RunPaths(here / "local" / "runs" / "mix")
    for stage in ("reflow-1", "reflow-2"):
        assert folder_bytes(run.student(stage) / "unet") == folder_bytes(other.student(stage) / "unet")
    for stage in ("solve-1", "solve-2"):
        pairs, theirs = (folder_bytes(each.stage(stage).pairs) for each in (run, other))
        assert {name: pairs[name] for name in theirs} == theirs
    ours, theirs = (rounds_table.rounds(results.of_run(each)) for each in (run, other))
    assert [rounds_table.cells(ours, each) for each in ours] == [rounds_table.cells(theirs, each) for each in theirs]
    assert Path(run.report).read_text().count("<h2>Rounds</h2>") == 1
