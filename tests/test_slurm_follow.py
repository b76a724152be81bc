"""`distill status`, `logs`, `cancel` and `doctor --site` with a real Slurm, and with one that no longer answers."""

import json
import os
import shutil
import signal
import time

import pytest
from cluster import Cluster
from runs import start, wait_for
from slurm_runs import (
    HELD,
    NEEDS_SLURM,
    begin,
    command_line,
    end_jobs,
    ends,
    enter,
    finish,
    last_job,
    named,
    program,
    queue,
    said,
    steps,
)

from distill.launch import slurm, standing
from distill.runs import jobs

pytestmark = NEEDS_SLURM


@pytest.fixture(scope="module")
def cluster():
    with Cluster(2) as found:
        yield found


@pytest.fixture
def here(cluster, tmp_path, monkeypatch):
    yield enter(cluster, tmp_path, monkeypatch)
    end_jobs(cluster)


def wait_line(process, text):
    """Read on to a line with this text: all that came."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines))


# --- status and logs ---


def test_a_run_is_followed_to_its_end(capfd, cluster, here):
    command_line(capfd, "submit", "teach.yaml", "stages.teach.images=6400")
    run = named("teach")
    job = last_job(run)
    following = begin("logs", "teach", "-f")
    cluster.wait(lambda: steps(run) >= 10, 120, "some steps")
    watching = begin("status", "teach", "--watch")
    shown = json.loads(command_line(capfd, "status", "teach", "--json").out)
    assert (shown["state"], shown["message"], shown["trouble"]) == ("running", "", "")
    assert [(each["job"], each["state"], each["stages"]) for each in shown["jobs"]] == [(job, "RUNNING", ["teach"])]
    (stage,) = shown["stages"]
    assert stage["total"] == 6400 and stage["saved_step"] >= 10
    wait_line(watching, "teach  running")
    watching.send_signal(signal.SIGINT)
    assert "Traceback" not in watching.communicate(timeout=30)[0]
    # a shell says 130 of both; the second is CPython's way where what was interrupted was the making of a dataclass
    assert watching.returncode in (130, -signal.SIGINT)
    finish(cluster, run, job)
    out, _ = following.communicate(timeout=60)
    assert following.returncode == 0
    assert "6,400/6,400 images" in out.splitlines()[-1]
    assert out.count(f"job {job}: stage teach: 1 process on n") == 1

    plain = command_line(capfd, "logs", "teach").out
    assert plain.splitlines()[0] == f"--- runs/teach/logs/teach.{job}.job.log"
    assert command_line(capfd, "logs", "teach", "--since=1d").out == plain
    heads = [line for line in plain.splitlines() if line.startswith("--- ")]
    assert command_line(capfd, "logs", "teach", "--since=2999-01-01 00:00:00").out.splitlines() == heads
    refused = {
        "--since=soon": "--since soon: must be 90s, 10m, 2h, 1d, or a time like 2026-11-25 17:40:00",
        "--rank=3": "--rank 3 has no log; there are logs of ranks 0",
        "--stage=tech": "stage 'tech' of run 'teach' has no logs in runs/teach/logs; valid: teach",
    }
    for option, message in refused.items():
        assert command_line(capfd, "logs", "teach", option, code=2).err == f"error: {message}\n"


# --- cancel ---


@pytest.mark.long
def test_cancel_at_once_and_by_slurms_own_command(capfd, cluster, here):
    runs = {}
    for name in ("now", "scancel"):
        command_line(capfd, "submit", "teach.yaml", f"--name={name}")
        runs[name] = named(name)
    for run in runs.values():
        cluster.wait(lambda run=run: steps(run) >= 2, 120, "some steps")
    job = last_job(runs["now"])
    assert command_line(capfd, "cancel", "now", "--now").out == f"job {job}: cancelled\n"
    cluster.run("scancel", last_job(runs["scancel"]))
    for name, run in runs.items():
        assert cluster.wait_state(last_job(run), "CANCELLED", "FAILED", "PENDING") == "CANCELLED", said(run)
        cluster.wait(lambda run=run: ends(run, last_job(run)), 30, "the last word")
        assert ends(run, last_job(run)) == [("cancelled", False)], said(run)
        assert "queued again" not in said(run)
        assert command_line(capfd, "status", name).out.startswith(f"{name}  cancelled")


@pytest.mark.long
def test_what_waits_is_cancelled_and_what_runs_here_too(capfd, cluster, here):
    command_line(capfd, "submit", "mix.yaml", "--pairs-jobs=2", HELD)
    members = [name for job in jobs.submitted(named("mix")) for name in job.members]
    assert command_line(capfd, "cancel", "mix").out == "".join(f"job {name}: cancelled\n" for name in members)
    assert queue(cluster) == []
    assert command_line(capfd, "cancel", "mix").out == "no process or job of run 'mix' is running or queued\n"
    shown = command_line(capfd, "status", "mix").out
    assert shown.startswith("mix  cancelled") and shown.endswith("\nresume with: distill submit runs/mix --resume\n")

    local = start("run", "teach.yaml", cwd=here, log=here / "log", env=os.environ)
    wait_for(lambda: steps(named("teach")) >= 2, local)
    told = command_line(capfd, "cancel", "teach").out
    assert told.endswith(": asked to save and exit\n")
    assert local.end(60) == 75, local.said
    last = steps(named("teach"))
    assert f"step-{last:08}" in local.said
    assert command_line(capfd, "cancel", "teach").out == "no process or job of run 'teach' is running or queued\n"


# --- a controller that does not answer ---


@pytest.mark.parametrize("how", ["dead", pytest.param("hung", marks=pytest.mark.long)])
def test_a_controller_that_does_not_answer(capfd, cluster, here, how):
    command_line(capfd, "submit", "solve.yaml", HELD)
    run = named("mix")
    (run.logs / "solve.rank-0.log").write_text("2026-11-25 18:00:00  a line\n")
    pid = int((cluster.folder / "run" / "slurmctld.pid").read_text())
    if how == "dead":
        cluster.stop_controller()
    else:
        os.kill(pid, signal.SIGSTOP)
    try:
        found = {}
        for arguments, code in [(["status", "mix"], 0), (["cancel", "mix"], 1), (["logs", "mix"], 0)]:
            before = time.monotonic()
            found[arguments[0]] = command_line(capfd, *arguments, code=code)
            assert time.monotonic() - before < 10, arguments
        before = time.monotonic()
        found["submit"] = command_line(capfd, "submit", "solve.yaml", "--name=other", code=1)
        assert time.monotonic() - before < 10
    finally:
        if how == "dead":
            cluster.start_controller()
        else:
            os.kill(pid, signal.SIGCONT)
    assert found["status"].out.startswith("mix  new  ")
    assert "warning: Slurm does not answer (" in found["status"].out
    assert "the output above uses only the runs' own events, not Slurm's job states\n" in found["status"].out
    for name in ("cancel", "submit"):
        assert found[name].err.startswith("error: Slurm does not answer ("), found[name]
        assert found[name].err.endswith("; try again later\n")
    assert "a line" in found["logs"].out
    assert not named("other").root.exists()
    assert command_line(capfd, "cancel", "mix").out == f"job {last_job(run)}: cancelled\n"


def test_states_without_accounting_come_from_the_controller_then_from_the_log(cluster, here):
    wrap = ("sbatch", "--parsable", "--output=/dev/null", "--wrap")
    done, failed = (cluster.run(*wrap, script).strip() for script in ("true", "exit 3"))
    array = cluster.run(*wrap[:-1], "--array=4-5", "--wrap", "exit $((SLURM_ARRAY_TASK_ID - 4))").strip()
    names = [done, failed, f"{array}_4", f"{array}_5"]
    expected = dict(zip(names, ["COMPLETED", "FAILED"] * 2, strict=True))

    def found():
        return {name: state.state for name, state in slurm.states([*names, "4711"]).items()}

    cluster.wait(lambda: found() == expected, 30, "the ends of jobs")
    assert slurm.states([failed])[failed].exit_code == "3:0"
    unknown = list(map(str, range(4711, 4731)))
    assert slurm.states([*names, *unknown]) == slurm.states(names), "asked once for all"
    cluster.stop_controller()
    shutil.rmtree(cluster.folder / "state")
    (cluster.folder / "state").mkdir()
    cluster.start_controller()
    assert slurm.show(done) == {}
    assert found() == expected
    assert slurm.states([*names, *unknown]) == slurm.states(names)


def test_the_accounting_is_preferred(cluster, here, monkeypatch):
    rows = """7|PREEMPTED|None|0:0|n1
8|TIMEOUT|None|0:9|n1
9_0|NODE_FAIL|None|1:0|n[1-2]
9_1|OUT_OF_MEMORY|None|0:125|n2
9_[2-3]|PENDING|Priority|0:0|
10|CANCELLED by 0|None|0:15|n1"""
    fake = program(
        here / "bin",
        "sacct",
        f'case "$*" in *--duplicates*) echo REQUEUED; echo PREEMPTED; echo RUNNING;; *) echo "{rows}";; esac',
    )
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    found = slurm.states(["7", "8", "9_0", "9_1", "10"])
    assert {name: state.state for name, state in found.items()} == {
        "7": "PREEMPTED",
        "8": "TIMEOUT",
        "9_0": "NODE_FAIL",
        "9_1": "OUT_OF_MEMORY",
        "10": "CANCELLED",
    }
    assert found["9_1"] == slurm.JobState("OUT_OF_MEMORY", "None", "0:125", "n2")
    assert slurm.previous_state("7") == "PREEMPTED"
    assert not any(state.is_live for state in found.values())
    waits = {"3": slurm.JobState("PENDING", "Resources")}
    assert standing.StageJob("3", ["a"], waits, {}, "").reason == "Resources"


# --- what a site does otherwise ---


@pytest.mark.long
def test_a_preempted_job_that_only_its_processes_hear_of(capfd, tmp_path, monkeypatch):
    """GraceTime, and no signal to the script: the processes get TERM, save and leave; the job queues itself again."""
    with Cluster(1, grace=30, user_signal=False) as cluster:
        enter(cluster, tmp_path, monkeypatch)
        command_line(capfd, "submit", "teach.yaml", "--partition=low")
        run = named("teach")
        job = last_job(run)
        cluster.wait(lambda: steps(run) >= 2, 120, "some steps")
        high = cluster.run(
            "sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true"
        )
        cluster.wait_state(high.strip(), "COMPLETED", seconds=60)
        (first,) = jobs.ends(run, job)
        assert (first["why"], first["again"]) == ("preempted", True), said(run)
        assert f"step-{first['step']:08}" in first["message"]
        finish(cluster, run, job)
        assert ends(run, job) == [("preempted", True), ("done", False)], said(run)


@pytest.mark.long
def test_where_the_node_cannot_ask_for_another_attempt(capfd, cluster, here):
    fake = program(
        here / "bin", "scontrol", 'if [ "$1" = requeue ]; then echo "no such right" >&2; exit 1; fi; exec REAL "$@"'
    )
    (here / "site.yaml").write_text(json.dumps({"environment": {"PATH": f"{fake}:$PATH"}}))
    command_line(capfd, "submit", "teach.yaml", "--site=site.yaml")
    run = named("teach")
    job = last_job(run)
    cluster.wait(lambda: steps(run) >= 2, 120, "some steps")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait_state(job, "FAILED", "PENDING") == "FAILED"
    assert cluster.show(job)["ExitCode"] == "75:0"
    trouble = f"the job could not be queued again (no such right); resume with: distill submit {run.root} --resume"
    assert trouble in said(run)
    shown = command_line(capfd, "status", "teach").out
    assert "could not be queued again" in shown.splitlines()[0], shown
    before = steps(run)
    command_line(capfd, "submit", str(run.root), "--resume")
    cluster.wait(lambda: steps(run) > before, 120, "more steps")


def test_a_node_without_slurms_commands_is_named(capfd, cluster, here):
    fake = program(here / "bin", "scontrol", 'echo "no Slurm here" >&2; exit 1')
    (here / "site.yaml").write_text(json.dumps({"environment": {"PATH": f"{fake}:$PATH"}}))
    command_line(capfd, "submit", "teach.yaml", "--site=site.yaml", "--nodes=2")
    run = named("teach")
    assert cluster.wait_state(last_job(run), "FAILED", "COMPLETED") == "FAILED"
    assert ends(run, last_job(run)) == [("crash", False)]
    trouble = "scontrol: no Slurm here"
    assert f"job {last_job(run)}: stage teach: crash: {trouble}\n" in said(run)
    assert f"resume with: distill submit {run.root} --resume" in said(run)


# --- doctor ---


def test_the_doctor_finds_all_well(capfd, cluster, here):
    done = command_line(capfd, "doctor", "--site", "--nodes=2")
    assert done.out.splitlines()[-1] == "no problems found", done.out
    assert [path.name for path in (here / "runs").iterdir()] == []


def test_the_doctor_names_what_the_nodes_do_not_see(capfd, cluster, here):
    site = {"setup": ["rm -f runs/.doctor-*/token"], "caches": {"TMPDIR": "/dev/null/tmp"}}
    (here / "site.yaml").write_text(json.dumps(site))
    done = command_line(capfd, "doctor", "--site", "site.yaml", "--nodes=1", code=1)
    first, second = done.out.splitlines()[-2:]
    assert first.startswith("rank 0 on n1: store: ") and first.endswith(": No such file or directory")
    assert second == "rank 0 on n1: TMPDIR: /dev/null/tmp: Not a directory"


def test_a_job_of_the_doctor_ends_with_it(cluster, here):
    (here / "site.yaml").write_text(json.dumps({"options": ["--hold"]}))
    doctor = begin("doctor", "--site", "site.yaml")
    wait_line(doctor, "PENDING (JobHeldUser)")
    doctor.send_signal(signal.SIGINT)
    assert doctor.wait(timeout=30) == 130
    assert queue(cluster) == []
    assert list((here / "runs").iterdir()) == []


def test_a_setup_that_fails_is_shown(capfd, cluster, here):
    (here / "site.yaml").write_text(json.dumps({"setup": ["cd /no/such/folder"]}))
    done = command_line(capfd, "doctor", "--site", "site.yaml", code=1)
    assert "ended in state FAILED (exit code 1:0); its log ends with:\n" in done.err
    assert "/no/such/folder: No such file or directory" in done.err
