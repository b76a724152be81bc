"""Records of cluster jobs, without Slurm: limits, ends, lead times, claims of units, parts of pairs."""

import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from runs import folder_bytes, make_run

from distill.core.atomic import write_json
from distill.core.errors import InputError, Stopped
from distill.core.owners import Owner
from distill.core.stop import StopRequest
from distill.launch import slurm, standing
from distill.pairs import generate
from distill.runs import claims, jobs
from distill.runs.progress import Progress
from distill.runs.run_store import append_event
from distill.spec import clusterspec
from distill.spec.layout import Layout
from distill.spec.model import GaussianTeacher, PairsStage
from distill.spec.pairspec import size
from distill.teachers.analytic import gaussian_teacher

# --- limits ---


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("0:45", 45),
        ("90:00", 5400),
        ("1:30:15", 5415),
        ("2-0", 2 * 86400),
        ("1-12", 36 * 3600),
        ("1-12:30", 36 * 3600 + 1800),
        ("1-12:30:05", 36 * 3600 + 1805),
        ("1-06:00:00", 30 * 3600),
        ("", None),
        ("1:2:3:4", None),
        ("soon", None),
        ("-5", None),
        ("1h", None),
        ("UNLIMITED", None),
        ("9" * 5000, None),
        ("\u0663\u0660", None),
    ],
)
def test_a_limit_in_slurms_notation(text, seconds):
    assert clusterspec.limit_seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("4", [4]), ("0-3", [0, 1, 2, 3]), ("1,3-4", [1, 3, 4]), ("0-8:4%2", [0, 4, 8]), ("0,2%1", [0, 2])],
)
def test_numbers_of_an_array(text, numbers):
    assert list(slurm._numbers(text)) == numbers


# --- ends ---


def ended(run, job, restart, why, again, **more):
    jobs.append(run, job, "ended", restart=restart, why=why, again=again, message="", **more)


def test_ends_and_restarts_by_reason(tmp_path):
    run = make_run(tmp_path)
    run.jobs.mkdir()
    for restart, why in enumerate(["asked", "crash", "asked"]):
        jobs.append(run, "7", "began", restart=restart, nodes="n1", stages=["teach"])
        ended(run, "7", restart, why, True)
    jobs.append(run, "7", "explained", restart=0, why="preempted")
    ended(run, "7", 3, "done", False)
    assert [(line["why"], line["again"]) for line in jobs.ends(run, "7")] == [
        ("preempted", True),
        ("crash", True),
        ("asked", True),
        ("done", False),
    ]
    ended(run, "8_1", 0, "crash", True)
    assert jobs.restarts(run, ["7", "8_0", "8_1"]) == {"preempted": 1, "crash": 2, "asked": 1}


def test_an_end_that_is_said_twice_counts_as_the_second_says(tmp_path):
    """A job that could not be queued again says so after it has said that it will be."""
    run = make_run(tmp_path)
    run.jobs.mkdir()
    ended(run, "7", 0, "asked", True)
    ended(run, "7", 0, "asked", False)
    assert [line["again"] for line in jobs.ends(run, "7")] == [False]
    assert jobs.restarts(run, ["7"]) == {}


def test_a_crash_at_the_step_of_the_last_one(tmp_path):
    run = make_run(tmp_path)
    run.jobs.mkdir()
    assert not jobs.crashed_before(run, "7", "teach", 5)
    ended(run, "7", 0, "crash", True, stage="teach", step=5)
    ended(run, "7", 1, "preempted", True, stage="teach", step=9)
    assert jobs.crashed_before(run, "7", "teach", 5)
    assert not jobs.crashed_before(run, "7", "teach", 6)
    assert not jobs.crashed_before(run, "7", "reflow", 5)
    ended(run, "7", 2, "crash", True, stage="teach", step=6)
    assert not jobs.crashed_before(run, "7", "teach", 5), "it has come further since"


def test_a_job_that_reaches_its_time_limit_without_a_step(tmp_path):
    run = make_run(tmp_path)
    run.jobs.mkdir()
    assert not jobs.made_no_step(run, "7", "teach", None)
    ended(run, "7", 0, "time limit", True, stage="teach", step=None)
    assert not jobs.made_no_step(run, "7", "teach", None), "the first start may take longer"
    ended(run, "7", 1, "time limit", True, stage="teach", step=None)
    assert jobs.made_no_step(run, "7", "teach", None)
    assert not jobs.made_no_step(run, "7", "teach", 3)
    assert not jobs.made_no_step(run, "7", "reflow", None)
    ended(run, "7", 2, "preempted", True, stage="teach", step=None)
    assert not jobs.made_no_step(run, "7", "teach", None), "it did not have its whole time"
    for restart in (3, 4, 5):
        assert not jobs.made_no_step(run, "7", "teach", 100)
        ended(run, "7", restart, "time limit", True, stage="teach", step=100)  # the first made the step
    assert jobs.made_no_step(run, "7", "teach", 100)


def test_the_position_of_a_failure_and_the_lead_that_saves_need(tmp_path):
    run = make_run(tmp_path)
    assert jobs.position(run, "teach", "no place") is None
    assert jobs.lead_needed(run) == 0
    for step, seconds in ((3, 1.5), (6, 20.0)):
        append_event(run, "saved", stage="teach", step=step, seconds=seconds)
    assert jobs.position(run, "teach", "no place") == 6
    assert jobs.position(run, "teach", "step 8, turn 0: not finite") == 8
    assert jobs.position(run, "reflow", "no place") is None
    assert jobs.lead_needed(run) == 100


# --- claims of units ---


def held_by(run, unit, owner):
    place = run.running if unit is None else run.units / unit
    place.mkdir(parents=True)
    write_json(place / "owner.json", owner.__dict__)
    return place


def test_units_are_claimed_side_by_side_but_not_beside_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "GRACE", 0.1)
    run = make_run(tmp_path)
    with claims.claim(run, "teach"), claims.claim(run, "solve.0"):
        with pytest.raises(InputError, match="run 'one' is being executed by process"):
            claims.claim(run).__enter__()
        with pytest.raises(InputError, match="run 'one' is being executed by process"):
            claims.claim(run, "teach").__enter__()
        with pytest.raises(InputError, match="run 'one' is being executed by process"):
            claims.refuse_if_executing(run)
    with claims.claim(run), pytest.raises(InputError, match="run 'one' is being executed by process"):
        claims.claim(run, "teach").__enter__()
    assert claims.held(run) == {}
    with claims.claim(run):
        pass


def test_a_later_attempt_of_a_job_takes_over_from_another_host(tmp_path):
    run = make_run(tmp_path)
    first = Owner("elsewhere", "b", 7, "1", "12", 0)
    place = held_by(run, "teach", first)
    me = Owner.this("12", 0)
    said = "run 'one' is being executed by job 12; wait for it, or stop it: distill cancel one"
    for other in (me, Owner.this("13", 5), Owner.this()):
        with pytest.raises(InputError) as caught:
            claims.claim(run, "teach", other).__enter__()
        assert str(caught.value) == said
    with claims.claim(run, "teach", replace(me, restart=1)):
        assert claims.owner(place) == replace(me, restart=1)
    assert claims.owner(place) is None


TAKE = """
import sys
from pathlib import Path
from distill.core.owners import Owner
from distill.runs import claims
from distill.runs.run_store import RunPaths
claims.GRACE = 0.5
with claims.claim(RunPaths(Path(sys.argv[1])), "teach", Owner.this("12", int(sys.argv[2]))):
    print("taken", flush=True)
    sys.stdin.read()
"""


def take(run, restart):
    """A process that takes over the stage, if it can, and holds it until its stdin is closed."""
    command = [sys.executable, "-c", TAKE, str(run.root), str(restart)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, **pipes, text=True)


@pytest.mark.process
def test_of_several_that_take_over_exactly_one_does(tmp_path):
    run = make_run(tmp_path)
    held_by(run, "teach", Owner("elsewhere", "b", 7, "1", "12", 0))
    for _ in range(2):
        racers = [take(run, 1) for _ in range(5)]
        deadline = time.monotonic() + 100
        while sum(racer.poll() is None for racer in racers) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert sorted(racer.communicate()[0] for racer in racers) == [""] * 4 + ["taken\n"]
        killed = take(run, 1)
        assert killed.stdout.readline() == "taken\n"
        killed.send_signal(signal.SIGKILL)
        killed.communicate()


# --- parts of pairs ---

STAGE = PairsStage(kind="pairs", count=44, solver="euler", steps=2, block=4, shard=8)  # six shards, the last is short
TEACHER = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[0.7, -1.0], std=[0.5, 2.0]))


class After(StopRequest):
    """Asks to stop after some blocks."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def raise_if_requested(self, saved):
        self.blocks -= 1
        if self.blocks < 0:
            raise Stopped(saved)


def solve(folder, part=None, stop=None):
    with Progress("pairs", STAGE.count, "pairs", None) as progress:
        generate(
            TEACHER,
            STAGE,
            folder,
            seed=3,
            device=torch.device("cpu"),
            progress=progress,
            stop=stop or StopRequest(),
            part=part,
        )
    return folder_bytes(folder)


def test_parts_in_any_order_and_stopped_make_the_undivided_set(tmp_path):
    whole = solve(tmp_path / "whole")
    assert Layout.of(STAGE).files == len(list((tmp_path / "whole").glob("shard-*.safetensors")))
    assert sum(size(STAGE, (number, 4)) for number in range(4)) == size(STAGE, None) == STAGE.count
    folder = tmp_path / "parts"
    assert jobs.missing_parts(STAGE, folder, 4) == [0, 1, 2, 3]
    for number in (2, 0):
        solve(folder, (number, 4))
    with pytest.raises(Stopped):
        solve(folder, (1, 4), After(2))  # one of its two shards
    assert jobs.missing_parts(STAGE, folder, 4) == [1, 3]
    found = folder_bytes(folder)
    assert {name for name in found if name.endswith("safetensors")} == {
        f"shard-{number:05}.safetensors" for number in (0, 1, 2, 4)
    }
    (folder / "shard-00004.safetensors").write_bytes(b"cut short")  # and its record says otherwise
    solve(folder, (1, 4))
    assert jobs.missing_parts(STAGE, folder, 4) == [3]
    assert solve(folder) == whole
    assert solve(folder, (3, 4)) == whole, "late, it changes nothing"


def test_more_parts_than_are_left_have_nothing_to_do(tmp_path):
    whole = solve(tmp_path / "whole")
    for number in range(6):
        solve(tmp_path / "parts", (number, 6))
    assert jobs.missing_parts(STAGE, tmp_path / "parts", 6) == []
    assert solve(tmp_path / "parts") == whole


# --- how a run stands on a cluster ---


def test_a_run_whose_jobs_have_said_how_they_ended_stands_so_without_asking_slurm(tmp_path):
    run = make_run(tmp_path)
    run.jobs.mkdir()
    jobs.append(run, "7", "submitted", stages=["pairs"], parts=[0, 1], script="pairs.parts.sbatch", after=[])
    jobs.append(run, "9", "submitted", stages=["teach"], parts=None, script="teach.sbatch", after=["7"])
    ended(run, "7_0", 0, "crash", True, stage="pairs", step=None)
    for job in ("7_0", "7_1", "9"):
        ended(run, job, 1, "done", False)
    (found,) = standing.read([run])
    assert (found.state, found.trouble) == ("new", "")
    assert [(job.job, job.state, job.stages, job.restarts, job.last) for job in found.jobs] == [
        ("7", "COMPLETED", ["pairs"], {"crash": 1}, ""),
        ("9", "COMPLETED", ["teach"], {}, ""),
    ]


def test_shards_are_counted_by_the_manifest_and_by_their_own_records(tmp_path):
    run = make_run(tmp_path)
    folder = run.stage("pairs").pairs
    folder.mkdir(parents=True)
    assert standing.shards(run, "pairs") == 0
    write_json(folder / "manifest.json", {"shards": {"shard-00000.safetensors": {"size": 3}}})
    for number in (0, 1):
        write_json(folder / f"shard-{number:05}.json", {})
    assert standing.shards(run, "pairs") == 2
    (folder / "manifest.json").write_text('{"shards": 3}')
    assert standing.shards(run, "pairs") == 2, "a damaged manifest is named by whoever uses the pairs"
    (folder / "shard-00000.json").unlink()
    assert standing.shards(run, "pairs") == 1


# --- what files of jobs may hold ---


def test_an_owner_leads_nowhere(tmp_path, monkeypatch):
    """Its record once became a path: running/ was renamed into a folder of somebody else."""
    monkeypatch.setattr(claims, "GRACE", 0.1)
    run = make_run(tmp_path / "store")
    me = Owner.this()
    (tmp_path / "victim").mkdir()
    (run.root / f".dead-{me.host}-123-").mkdir()
    run.running.mkdir()
    for bad in ({"start": "/../../../victim"}, {"host": "a/b"}, {"boot": "a\nb"}, {"job": "\x1b[2J"}):
        write_json(run.running / "owner.json", asdict(me) | {"pid": 123} | bad)
        with pytest.raises(InputError, match="running cannot be read; if no process executes this run, remove that"):
            claims.claim(run).__enter__()
        assert run.running.is_dir() and list((tmp_path / "victim").iterdir()) == []
    write_json(run.running / "owner.json", asdict(me) | {"pid": 2**31 - 1})
    with claims.claim(run):
        assert claims.owner(run.running) == me
    (dead,) = [path for path in run.root.glob(".dead-*") if re.fullmatch("[.]dead-[0-9a-f]{24}", path.name)]
    dead.rename(run.running)
    (dead / "full").mkdir(parents=True)
    with pytest.raises(InputError, match=f"cannot be renamed to {dead.name}; delete both folders"):
        claims.claim(run).__enter__()


def test_a_process_of_another_boot_is_another():
    me = Owner.this()
    others = [replace(me, **{name: "x"}) for name in ("host", "boot", "start", "namespace")]
    others.append(replace(me, pid=7))
    assert len({each.token for each in [me, *others]}) == 6


@pytest.mark.long
def test_submissions_are_of_bounded_number_and_size(tmp_path):
    run = make_run(tmp_path)
    run.jobs.mkdir()
    fields = {"stages": ["teach"], "parts": None, "script": "a.sh", "after": []}
    for number in range(1, 1011):
        jobs.append(run, str(number), "submitted", **fields)
    assert [job.id for job in jobs.submitted(run)] == [str(number) for number in range(11, 1011)]
    jobs.append(run, "1011", "submitted", **fields | {"parts": list(range(10_000))})
    assert len(jobs.submitted(run)[-1].members) == 10_000
    jobs.append(run, "1012", "submitted", **fields | {"parts": list(range(10_001))})
    with pytest.raises(InputError, match="submitted.parts: .* given; list should have at most 10000 items"):
        jobs.submitted(run)


def test_the_controller_is_asked_once_for_many_jobs(tmp_path, monkeypatch):
    """Commands in place of Slurm's: no accounting, and a controller that knows some jobs, also of others."""
    known = {
        "3": "JobId=3 JobState=RUNNING Reason=None ExitCode=0:0 NodeList=n1",
        "9": "JobId=9 ArrayJobId=9 ArrayTaskId=1-2%1 JobState=PENDING Reason=Priority ExitCode=0:0 NodeList=",
        "77": "JobId=77 JobState=RUNNING Reason=None ExitCode=0:0 NodeList=n2",
    }
    (tmp_path / "bin").mkdir()
    cases = "".join(f"{job}) echo '{line}';;\n" for job, line in known.items())
    every = "; ".join(f"echo '{line}'" for line in known.values())
    (tmp_path / "bin" / "scontrol").write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n[ "$2" = config ] && exit 0\ncase "$4" in\n"") {every};;\n{cases}'
        '*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;\nesac\n'
    )
    (tmp_path / "bin" / "sacct").write_text("#!/bin/bash\nexit 1\n")
    for program in ("scontrol", "sacct"):
        (tmp_path / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin")
    few = slurm.states(["3", "9_1", "9_3"])
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line for line in asked if "job" in line] == ["show job --oneliner 3", "show job --oneliner 9"]
    assert few == {
        "3": slurm.JobState("RUNNING", "None", "0:0", "n1"),
        "9_1": slurm.JobState("PENDING", "Priority", "0:0"),
    }
    (tmp_path / "asked").unlink()
    assert slurm.states(["3", "9_1", "9_3", *map(str, range(1000, 3000))]) == few
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line for line in asked if "job" in line] == ["show job --oneliner"]
