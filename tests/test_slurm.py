"""Runs on a real Slurm cluster of two nodes: after any disturbance, a run ends by itself with the same student."""

import pytest
import slurm_runs
from cluster import Cluster
from runs import distill, folder_bytes
from slurm_runs import NEEDS_SLURM, ends, finish, kill_rank, last_job, said, steps, submit, wait_steps

from distill.runs.run_store import RunPaths
from distill.spec import registry

pytestmark = NEEDS_SLURM


@pytest.fixture(scope="module")
def cluster():
    with Cluster(2) as found:
        yield found


def specs(folder):
    (folder / "small.yaml").write_text(slurm_runs.SPEC)
    return folder


def student(run):
    return folder_bytes(run.student("teach") / "unet")


# What ends a job, in order: the reason that the job notes, and what `status` calls it.
ENDS = {"asked": "stop signal", "preempted": "preempted", "crash": "crash", "node failure": "node failure"}


def disturb(cluster, run, job, why):
    """End the current attempt of a job."""
    if why == "asked":
        cluster.run("scontrol", "requeue", job)
    elif why == "preempted":
        cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap", "sleep 1")
    elif why == "crash":
        kill_rank(cluster, 1)
    else:
        cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=a test")


@pytest.mark.parametrize(
    ("procs", "zero", "reasons"),
    [
        (1, "null", ["preempted"]),
        pytest.param(1, "null", list(ENDS), marks=pytest.mark.long),
        pytest.param(2, "2", list(ENDS), marks=pytest.mark.long),
    ],
    ids=["2 x 1", "2 x 1, all", "2 x 2, ZeRO-2, all"],
)
def test_whatever_ends_a_job_the_student_is_the_same(cluster, tmp_path, procs, zero, reasons):
    """Each once the run has come some steps further."""
    specs(tmp_path)
    changes = (f"launch.zero_stage={zero}", f"stages.teach.images={640 * procs * len(reasons)}")
    local = distill("run", "small.yaml", *changes, f"--procs={2 * procs}", "--name=local", cwd=tmp_path)
    assert local.returncode == 0, local.stderr
    submit(cluster, tmp_path, "small.yaml", *changes, "--nodes=2", f"--procs-per-node={procs}", "--partition=low")
    run = RunPaths(tmp_path / "runs" / "small")
    job = last_job(run)
    for attempt, why in enumerate(reasons):
        wait_steps(cluster, run, attempt)
        disturb(cluster, run, job, why)
    finish(cluster, run, job)
    assert ends(run, job) == [*((why, True) for why in reasons), ("done", False)], said(run)
    assert student(run) == student(RunPaths(tmp_path / "runs" / "local"))
    shown = distill("status", "small", cwd=tmp_path, env=cluster.env).stdout
    assert "small  done" in shown
    assert f"job {job} was queued again: {', '.join(f'1 x {ENDS[why]}' for why in reasons)}" in shown


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_time_limit_costs_no_step(cluster, tmp_path):
    """A limit of two minutes, which Slurm notes every half minute: two or more jobs' worth of steps."""
    specs(tmp_path)
    changes = ("stages.teach.images=19200", "stages.teach.checkpoint.images=1600")
    local = distill("run", "small.yaml", *changes, "--procs=4", "--name=local", cwd=tmp_path)
    assert local.returncode == 0, local.stderr
    options = ("--time=2", "launch.slurm.lead_seconds=50")
    submit(cluster, tmp_path, "small.yaml", *changes, "--nodes=2", "--procs-per-node=2", *options)
    run = RunPaths(tmp_path / "runs" / "small")
    job = last_job(run)
    finish(cluster, run, job, seconds=900)
    assert {why for why, _ in ends(run, job)} == {"time limit", "done"}, said(run)
    assert student(run) == student(RunPaths(tmp_path / "runs" / "local"))
    assert steps(run) == 600


@pytest.mark.long
def test_a_job_without_the_time_to_start_ends(cluster, tmp_path):
    """Its processes receive the signal before they have read the recipe, after 30 seconds at the latest."""
    specs(tmp_path)
    text = (registry.package_folder() / "pretrain" / "flow_matching.py").read_text()
    slow = "import os, time\ntime.sleep(40 if 'SLURM_JOB_ID' in os.environ else 0)\nfrom collections.abc"
    (tmp_path / "mine.py").write_text(text.replace("from collections.abc", slow, 1))
    options = ("--time=1", "launch.slurm.lead_seconds=59", "stages.teach.recipe=./mine.py")
    submit(cluster, tmp_path, "small.yaml", *options)
    run = RunPaths(tmp_path / "runs" / "small")
    job = last_job(run)
    assert cluster.wait_state(job, "FAILED", "COMPLETED", seconds=300) == "FAILED"
    assert ends(run, job) == [("time limit", True), ("time limit", True), ("time limit", False)], said(run)
    shown = distill("status", "small", cwd=tmp_path, env=cluster.env).stdout
    assert shown.startswith("small  FAILED: time limit: stopped by SIGUSR1; saved: nothing"), shown
    assert (
        "this was the third time in a row without a new step, so the job was not queued again; use a longer "
        f"launch.slurm.time, or a shorter launch.slurm.lead_seconds, then: distill submit {run.root} --resume"
    ) in " ".join(shown.split()), shown
