"""What the main process of a Slurm job concludes from the ends of its processes, without Slurm."""

import pytest
from runs import make_run

from distill.launch import batch_job
from distill.launch.batch_job import ASKED, BatchJob, Verdict
from distill.launch.tasks import End
from distill.runs import jobs

STAGE = "reflow"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose job 7 may crash twice."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(batch_job.OwnLog, "reason", lambda self, **_: None)
    monkeypatch.setattr(batch_job.slurm, "show", lambda job: {"JobState": "RUNNING"})
    run = make_run(tmp_path, "one", "mixture-2d", "launch.slurm.max_crashes=2")
    run.jobs.mkdir()
    return run


def judged(run, monkeypatch, *ends, restart=0, code=1, size=2, asked=False):
    """The verdict on an attempt with these ends (rank, exit code, message), in order of time; it is recorded."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    job = BatchJob(run, [STAGE], None, ["srun"])
    found = [End(rank, ended, message, float(i)) for i, (rank, ended, message) in enumerate(ends)]
    verdict = job._judge(STAGE, code, size, found, asked)
    step = jobs.position(run, STAGE, verdict.message)
    job._note("ended", stage=STAGE, step=step, why=verdict.why, again=verdict.again, code=verdict.code)
    return verdict


PEER = (0, 76, "step 5: lost contact with another rank")
CASES = {
    "a crash, which the other rank notices first": (
        [PEER, (1, 1, "step 5: ZeroDivisionError")],
        Verdict("crash", 1, "rank 1: step 5: ZeroDivisionError", again=True),
    ),
    "wrong input is not tried again": (
        [(1, 1, "step 5: ZeroDivisionError"), (0, 2, "error: no such step")],
        Verdict("refused", 2, "error: no such step"),
    ),
    "a rank that was killed": (
        [PEER],
        Verdict(
            "crash",
            1,
            "rank 1 exited without an error message (killed? out of memory?); step 5: lost contact with another rank",
            again=True,
        ),
    ),
    "a crash counts more than a stop": (
        [(0, 75, "saved at step 5"), (1, 1, "step 5: no space left")],
        Verdict("crash", 1, "rank 1: step 5: no space left", again=True),
    ),
    "a stop": ([(0, 75, "saved at step 5"), PEER], Verdict(ASKED, 75, "saved at step 5", again=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_rank_that_failed_by_itself_decides(run, monkeypatch, case):
    ends, expected = CASES[case]
    assert judged(run, monkeypatch, *ends) == expected


def test_a_job_that_is_stopped_during_startup(run, monkeypatch):
    message = "it received the signal during startup, so nothing new was saved"
    assert judged(run, monkeypatch, size=0, asked=True) == Verdict(ASKED, 75, message, again=True)


def test_a_stage_that_is_not_finished_has_not_succeeded(run, monkeypatch):
    message = "all processes exited with code 0, but the stage is not finished"
    assert judged(run, monkeypatch, code=0) == Verdict("crash", 1, message, again=True)
    run.stage(STAGE).done.parent.mkdir(parents=True)
    run.stage(STAGE).done.touch()
    assert judged(run, monkeypatch, code=0, restart=1) == Verdict("done", 0)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ((5, 5), "the job crashed at step 5 for the second time"),
        ((5, 6, 7), "launch.slurm.max_crashes=2 is reached"),
        ((5, 6, 6), "the job crashed at step 6 for the second time"),
    ],
)
def test_a_job_that_crashes_again_and_again(run, monkeypatch, steps, reason):
    found = [judged(run, monkeypatch, (0, 1, f"step {n}: failed"), restart=i) for i, n in enumerate(steps)]
    assert [each.again for each in found] == [True] * (len(steps) - 1) + [False]
    advice = f"fix the cause, then: distill submit {run.root} --resume"
    assert found[-1].message == f"rank 0: step {steps[-1]}: failed; {reason}, so it was not queued again; {advice}"


def test_a_time_limit_that_allows_no_step(run, monkeypatch):
    monkeypatch.setattr(batch_job.OwnLog, "reason", lambda self, **_: "time limit")
    end = (0, 75, "saved at step 5")
    found = [judged(run, monkeypatch, end, restart=i, size=1) for i in range(4)]
    assert [(each.why, each.code, each.again) for each in found] == [("time limit", 75, i < 3) for i in range(4)]
    assert found[-1].message == (
        "saved at step 5; this was the third time in a row without a new step, so the job was not queued again; use a "
        "longer launch.slurm.time, or a shorter launch.slurm.lead_seconds, then: distill submit "
        f"{run.root} --resume"
    )
