"""Workflows on a real Slurm cluster: the same bytes as on one machine, after any failure or stop."""

import os
import signal
from pathlib import Path

import pytest
from cluster import Cluster
from runs import distill, folder_bytes
from slurm_runs import (
    HELD,
    MIXTURE,
    NEEDS_SLURM,
    command_line,
    end_jobs,
    ends,
    enter,
    finish,
    last_job,
    named,
    queue,
    said,
    steps,
)

from distill.runs import jobs
from distill.runs.run_store import RunPaths
from distill.spec import registry

pytestmark = NEEDS_SLURM


@pytest.fixture(scope="module")
def cluster():
    with Cluster(2) as found:
        yield found


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The pairs and the student of the workflow, made on this machine by two processes."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "mix.yaml").write_text(MIXTURE[: MIXTURE.index("  evaluate:")] + "launch: {threads: 1}\n")
    done = distill("run", "mix.yaml", "--procs=2", cwd=folder)
    assert done.returncode == 0, done.stderr
    return RunPaths(folder / "runs" / "mix")


@pytest.fixture(autouse=True)
def here(cluster, tmp_path, monkeypatch):
    yield enter(cluster, tmp_path, monkeypatch)
    end_jobs(cluster)


def submit(capfd, *arguments, code=0):
    return command_line(capfd, "submit", *arguments, code=code)


def same(run, other):
    """Whether pairs and students are the same bytes."""
    pairs, theirs = (folder_bytes(each.stage("solve").pairs) for each in (run, other))
    assert {name: content == pairs.get(name) for name, content in theirs.items()} == dict.fromkeys(pairs, True)
    assert folder_bytes(run.student("reflow") / "unet") == folder_bytes(other.student("reflow") / "unet")


def process_of(job):
    """The process that computes in a job, by the name that Slurm gives this job; None: not yet."""
    array, _, part = job.partition("_")
    mark = f"SLURM_ARRAY_JOB_ID={array}\0" if part else f"SLURM_JOB_ID={array}\0"
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes()
            if (
                mark.encode() in environment
                and (not part or f"SLURM_ARRAY_TASK_ID={part}\0".encode() in environment)
                and b"SLURM_STEP_ID=" in environment  # not the job's own process, nor srun
                and b"\0stage\0" in (path / "cmdline").read_bytes()
            ):
                return int(path.name)
        except OSError:
            continue
    return None


# --- the same workflow, here and there ---


@pytest.mark.long
def test_a_workflow_makes_the_same_bytes_as_on_one_machine(capfd, cluster, local):
    """While one part of the array is queued again, and the process of the other is killed."""
    submit(capfd, "mix.yaml", "--nodes=2", "--pairs-jobs=2")
    run = named("mix")
    array, *_, last = (job.id for job in jobs.submitted(run))
    cluster.wait_state(f"{array}_0", "RUNNING")
    cluster.run("scontrol", "requeue", f"{array}_0")
    os.kill(cluster.wait(lambda: process_of(f"{array}_1"), 60, "a process"), signal.SIGKILL)
    finish(cluster, run, last)
    assert [ends(run, f"{array}_{part}") for part in (0, 1)] == [
        [("asked", True), ("done", False)],
        [("crash", True), ("done", False)],
    ]
    same(run, local)
    shown = command_line(capfd, "status", "mix").out
    assert "mix  done" in shown
    assert f"job {array} was queued again: 1 x stop signal, 1 x crash" in shown
    assert (run.stage("evaluate").root / "results.json").exists()


@pytest.mark.long
def test_cancelled_it_saves_first_and_goes_on_to_the_same_bytes(capfd, cluster, local):
    """All stages in one job, which `cancel` ends in the middle of the training."""
    submit(capfd, "mix.yaml", "--nodes=2", "--one-job")
    run = named("mix")
    job = last_job(run)
    cluster.wait(lambda: steps(run) >= 3, 120, "some steps")
    assert command_line(capfd, "cancel", "mix").out == f"job {job}: asked to save and exit\n"
    assert cluster.wait_state(job, "FAILED", "CANCELLED", "COMPLETED", "PENDING") in ("FAILED", "CANCELLED"), said(run)
    assert ends(run, job) == [("cancelled", False)]
    (last,) = jobs.ends(run, job)
    assert f"step-{last['step']:08}" in last["message"] and last["step"] == steps(run) < 20, last
    assert queue(cluster) == []
    shown = command_line(capfd, "status", "mix").out
    assert shown.startswith("mix  cancelled: stopped by SIGUSR1; saved: "), shown
    submit(capfd, "mix", "--resume")
    finish(cluster, run, last_job(run))
    same(run, local)
    assert command_line(capfd, "cancel", "mix").out == "no process or job of run 'mix' is running or queued\n"


@pytest.mark.long
def test_what_fails_for_good_takes_those_that_wait_for_it_and_only_what_is_missing_is_made(capfd, cluster, here, local):
    (here / "two.yaml").write_text(MIXTURE[: MIXTURE.index("  evaluate:")] + "launch: {threads: 1}\n")
    submit(capfd, "two.yaml", "--pairs-jobs=2", "launch.slurm.max_crashes=0", HELD)
    run = named("mix")
    array, merge, train = (job.id for job in jobs.submitted(run))
    cluster.run("scontrol", "release", f"{array}_0", merge, train)
    assert cluster.wait_state(f"{array}_0", "COMPLETED", "FAILED") == "COMPLETED"
    in_the_way = run.stage("solve").pairs / "shard-00003.safetensors"
    in_the_way.mkdir()
    cluster.run("scontrol", "release", f"{array}_1")
    assert cluster.wait_state(f"{array}_1", "COMPLETED", "FAILED") == "FAILED"
    for job in (merge, train):
        assert cluster.wait_state(job, "CANCELLED", "COMPLETED", seconds=30) == "CANCELLED"
    shown = command_line(capfd, "status", "mix").out
    assert shown.startswith(f"mix  FAILED: crash: rank 0: error: cannot write {in_the_way}: Is a directory; "), shown
    assert "5 shards" in shown and "1 COMPLETED, 1 FAILED" in shown
    in_the_way.rmdir()
    again = submit(capfd, "mix", "--resume", "launch.slurm.options=[]")
    assert "array of 1" in again.out
    assert [job.parts for job in jobs.submitted(run)] == [[0, 1], None, None, [1], None, None]
    finish(cluster, run, last_job(run))
    pairs, theirs = (folder_bytes(each.stage("solve").pairs) for each in (run, local))
    assert pairs == theirs
    assert command_line(capfd, "status", "mix").out.startswith("mix  done")


# --- recipes that fail ---

FAILING = ("stages.teach.recipe=./mine.py", "stages.teach.images=320")
FIX = "fix the cause, then: distill submit"
# name: a line of the recipe; ends of the job's attempts; beginning of the status
FAIL = {
    "twice": (
        "if ctx.step == 5 and os.environ['SLURM_PROCID'] == '1': raise ZeroDivisionError('the fifth')",
        [("crash", True), ("crash", False)],
        "FAILED: crash: rank 1: ZeroDivisionError: the fifth; the job crashed at step 5 for the second time, so it was "
        f"not queued again; {FIX} ",
    ),
    "refuses": (
        "if ctx.step == 5: raise InputError('no such step')",
        [("refused", False)],
        "FAILED: refused: error: no such step  ",
    ),
    "once": (
        "if ctx.step == 5 and not int(os.environ.get('SLURM_RESTART_COUNT', 0)): raise ZeroDivisionError('once')",
        [("crash", True), ("done", False)],
        "done  ",
    ),
    "often": (
        "if ctx.step == 5 + int(os.environ.get('SLURM_RESTART_COUNT', 0)): raise ZeroDivisionError('often')",
        [("crash", True), ("crash", False)],
        "FAILED: crash: rank 0: ZeroDivisionError: often; launch.slurm.max_crashes=1 is reached, so it was not queued "
        f"again; {FIX} ",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("names", [("twice", "refuses"), ("once", "often")], ids="-".join)
def test_recipes_that_fail(capfd, cluster, here, names):
    """At the same time: they wait most of it. tests/test_verdicts.py has the decisions without Slurm."""
    text = (registry.package_folder() / "pretrain" / "flow_matching.py").read_text()
    for name in names:
        mine = text.replace("from collections.abc", "import os\nfrom collections.abc", 1)
        place = "        assert batch.data is not None\n"
        (here / "mine.py").write_text(mine.replace(place, f"        {FAIL[name][0]}\n{place}", 1))
        more = ("--nodes=2",) if name == "twice" else ("launch.slurm.max_crashes=1",)
        submit(capfd, "teach.yaml", *FAILING, f"--name={name}", *more)
    for name in names:
        run, (_, expected, head) = named(name), FAIL[name]
        cluster.wait_state(last_job(run), "COMPLETED", "FAILED")
        assert ends(run, last_job(run)) == expected
        shown = command_line(capfd, "status", name).out
        assert shown.startswith(f"{name}  {head}{f'{run.root} --resume  ' if FIX in head else ''}")
    if "twice" in names:
        lines = command_line(capfd, "logs", "twice").out.splitlines()
        assert lines[0].startswith("--- first traceback: rank 1 at 20")
        assert lines[0].endswith(", runs/twice/logs/teach.rank-1.log")
        assert lines[1] == "Traceback (most recent call last):"
        assert lines.index("ZeroDivisionError: the fifth") < lines.index("--- runs/twice/logs/teach.rank-0.log")
        assert "rank 0 failed" not in said(named("twice"))
