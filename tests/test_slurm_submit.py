"""`distill submit` with a real Slurm: what it refuses before anything is queued, and that it never queues twice."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from commands import command, snapshot
from runs import ENV, start
from slurm_runs import HELD, NEEDS_SLURM, command_line, end_jobs, enter, last_job, named, program, queue, said

from distill.runs import jobs, todo
from distill.runs.run_store import RunPaths, append_event, read_events

ROOT = Path(__file__).parent.parent
pytestmark = NEEDS_SLURM


@pytest.fixture(scope="module")
def cluster():
    with Cluster(2) as found:
        yield found


@pytest.fixture(autouse=True)
def here(cluster, tmp_path, monkeypatch):
    yield enter(cluster, tmp_path, monkeypatch)
    end_jobs(cluster)


def submit(capfd, *arguments, code=0):
    return command_line(capfd, "submit", *arguments, code=code)


def _waiting(cluster):
    return cluster.run("squeue", "--noheader", "--format=%F").split()


# --- refused before anything is queued ---

SITES = {
    "few.yaml": "partitions: [low]",
    "wrong.yaml": "partitions: [low, bach]",
    "key.yaml": "modles: [cuda]",
    "list.yaml": "- cuda",
}
REFUSED = {
    "unknown partition": (
        ["--partition=btach"],
        "launch.slurm.partition: 'btach' is not a partition for distill jobs; did you mean 'batch'? "
        "valid: batch, high, low",
    ),
    "not the site's": (
        ["--partition=batch", "--site=few.yaml"],
        "launch.slurm.partition: 'batch' is not a partition for distill jobs; valid: low",
    ),
    "the site's own": (
        ["--site=wrong.yaml"],
        "wrong.yaml: partitions: Slurm has no partition 'bach'; did you mean 'batch'? valid: batch, high, low",
    ),
    "unknown key": (
        ["--site=key.yaml"],
        "key.yaml: modles: unknown key; did you mean 'modules'? valid: account, caches, container, environment, "
        "gpus, modules, options, partition, partitions, python, qos, setup",
    ),
    "no mapping": (
        ["--site=list.yaml"],
        f"list.yaml: contains ['cuda'], not the settings of a site; see {ROOT}/slurm/site.example.yaml",
    ),
    "no site": (
        ["--site=none.yaml"],
        f"there is no site file none.yaml; copy and edit {ROOT}/slurm/site.example.yaml",
    ),
    "time": (
        ["--time=1:2:3:4"],
        "spec 'mix': launch.slurm.time: '1:2:3:4' is not a time limit; valid: MINUTES, H:MM:SS, D-HH or D-HH:MM:SS",
    ),
    "lead": (
        ["--time=3"],
        "spec 'mix': launch.slurm.lead_seconds: 180 s must be less than the time limit of 180 s (time: 3); "
        "increase time, or decrease lead_seconds",
    ),
    "GPUs": (
        ["--gpus-per-node=2", "--procs-per-node=1"],
        "spec 'mix': launch.slurm.gpus_per_node: 2 given, but launch.procs is 1; each process uses one GPU, so "
        "make them equal",
    ),
    "parts": (
        ["--pairs-jobs=9"],
        "spec 'mix': launch.slurm.pairs_jobs: 9 jobs given, but stage 'solve' has only 8 shards; give fewer jobs, or a "
        "smaller stages.solve.shard",
    ),
    "container": (
        ["--container=i.sif"],
        f"launch.slurm.container: i.sif given, but {ROOT}/slurm/site.example.yaml sets no container.runtime; "
        "valid: pyxis, apptainer",
    ),
    "code": (["--code=mine"], "--code mine: valid: current, run"),
    "an option of sbatch": (
        ["launch.slurm.options=[--no-such-option]"],
        "Slurm rejected solve.sbatch: sbatch: unrecognized option '--no-such-option'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_queued(capfd, cluster, here, arguments, message):
    for name, content in SITES.items():
        (here / name).write_text(content)
    (here / "runs").mkdir()
    before = snapshot(here)
    done = submit(capfd, "mix.yaml", *arguments, code=2)
    assert done.err == f"error: {message}\n"
    assert snapshot(here) == before
    assert queue(cluster) == []


def test_without_slurm_the_script_can_be_seen_and_is_the_one_that_is_submitted(capfd, here, monkeypatch):
    arguments = ("mix.yaml", "--nodes=2", "--pairs-jobs=2", "--time=1-00", HELD)
    with monkeypatch.context() as without:
        without.setenv("PATH", str(here))
        without.delenv("SLURM_CONF")
        refused = submit(capfd, *arguments, code=2)
        shown = submit(capfd, *arguments, "--dry-run")
    assert refused.err == (
        "error: there is no Slurm here (no command sbatch); use a login node, or --dry-run to see the script\n"
    )
    assert not (here / "runs").exists()
    submit(capfd, *arguments)
    heads = ["solve.parts", "solve", "reflow", "evaluate"]
    waits = ["", "  (after solve.parts)", "  (after solve)", "  (after reflow)"]
    scripts = [(named("mix").jobs / f"{name}.sbatch").read_text() for name in heads]
    expected = [
        f"# --- {head}.sbatch{wait} ---\n{text}\n" for head, wait, text in zip(heads, waits, scripts, strict=True)
    ]
    assert shown.out == "".join(expected)
    assert all(line.startswith("#SBATCH --") for text in scripts for line in text.splitlines() if "#SBATCH" in line)


def test_which_site_counts(capfd, here, monkeypatch):
    def site(*arguments):
        lines = submit(capfd, "mix.yaml", "--dry-run", *arguments).out.splitlines()
        return next(line for line in lines if line.startswith("# the site: ")).removeprefix("# the site: ")

    assert site() == str(ROOT / "slurm" / "site.example.yaml")
    for name in ("user", "variable", "option"):
        (here / f"{name}.yaml").write_text(f"account: {name}\n")
    (here / "config" / "distill").mkdir(parents=True)
    (here / "config" / "distill" / "config.yaml").write_text(f"site: {here}/user.yaml\n")
    assert site() == f"{here}/user.yaml"
    monkeypatch.setenv("DISTILL_SITE", "variable.yaml")
    assert site() == "variable.yaml"
    assert site("--site=option.yaml") == "option.yaml"
    assert "--account=option" in submit(capfd, "mix.yaml", "--dry-run", "--site=option.yaml").out


# --- names and paths ---

ODD = "a b 'c' \"d\" $HOME `e` %j #f"


def test_odd_names_and_paths_come_through(capfd, cluster, here):
    """Into the job's variables, through a container's command line, and into every path of the store."""
    store, seen, image = here / ODD, here / "seen", "im age $x 'y'.sif"
    words = f'printf "%s\\n" "$PLAIN" "$FILLED" "$@" > {seen}'
    fake = program(here / "bin", "apptainer", f'{words}; while [ "$1" != "$IMAGE" ]; do shift; done; shift; exec "$@"')
    site = {
        "setup": [f"export IMAGE={shlex.quote(image)}", "export SCRATCH=/scratch"],
        "environment": {"PATH": f"{fake}:$PATH", "PLAIN": "a \"b\" 'c' `d` \\e", "FILLED": "$SCRATCH/x"},
        "container": {
            "runtime": "apptainer",
            "mounts": ["/m n"],
            "options": ["--env=A=$B 'c'"],
            "python": sys.executable,
        },
    }
    (here / "site.yaml").write_text(json.dumps(site))
    arguments = (f"launch.slurm.container={json.dumps(image)}", "--site=site.yaml", f"--store={store}", "--name=o.d_d-")
    submit(capfd, "solve.yaml", *arguments)
    run = RunPaths(store / "o.d_d-")
    cluster.wait(lambda: not queue(cluster), 120, "the end of the job")
    assert run.stage("solve").done.exists(), said(run)
    came = seen.read_text().splitlines()
    before = ["a \"b\" 'c' `d` \\e", "/scratch/x", "exec", f"--bind={store}", "--bind=/m n", "--env=A=$B 'c'"]
    assert came[: len(before) + 2] == [*before, image, sys.executable]
    logs = {path.name for path in run.logs.iterdir()}
    assert logs == {f"solve.{last_job(run)}.job.log", "solve.rank-0.log"}
    assert [path.name for path in here.iterdir() if "home" in path.name.lower()] == [ODD]


# --- never twice ---


def test_a_name_that_is_taken_is_refused_and_what_is_queued_is_not_queued_again(capfd, cluster, here):
    submit(capfd, "mix.yaml", HELD)
    run = named("mix")
    assert queue(cluster) == ["mix.evaluate", "mix.reflow", "mix.solve"]
    first, second, third = (job.id for job in jobs.submitted(run))
    assert cluster.show(second)["Dependency"] == f"afterok:{first}(unfulfilled)"
    assert cluster.show(third)["Dependency"] == f"afterok:{second}(unfulfilled)"
    before = snapshot(here)
    done = submit(capfd, "mix.yaml", HELD, code=2)
    assert done.err == (
        f"error: there is a run 'mix' in {here}/runs already; resume it with --resume, or start another with "
        "--name OTHER\n"
    )
    assert snapshot(here) == before
    done = submit(capfd, "mix", "--resume")
    assert done.out.splitlines() == [
        f"job {first} is running or queued: solve",
        f"job {second} is running or queued: reflow",
        f"job {third} is running or queued: evaluate",
        "nothing to submit for run 'mix': its unfinished stages are already queued or running",
    ]
    done = submit(capfd, "mix", "--resume", "--nodes=2", code=2)
    assert done.err == (
        f"error: jobs of run 'mix' are running or queued ({first}, {second}, {third}), so the spec cannot change "
        "(launch.nodes: 1 -> 2); wait for them, or: distill cancel mix\n"
    )
    done = command(capfd, "clean", "mix", "--all", "--yes")
    assert (done.code, done.err) == (
        2,
        f"error: jobs of run 'mix' are running or queued ({first}, {second}, {third}); wait for them, "
        "or: distill cancel mix\n",
    )
    assert snapshot(here) == before
    cluster.run("scancel", third)
    submit(capfd, "mix", "--resume")
    assert queue(cluster) == ["mix.evaluate", "mix.reflow", "mix.solve"]
    assert cluster.show(last_job(run))["Dependency"] == f"afterok:{second}(unfulfilled)"


def test_what_waits_for_parts_that_have_failed_is_not_queued_beside_the_others(capfd, cluster, here):
    submit(capfd, "mix.yaml", "--pairs-jobs=2", HELD)
    array, *others = (job.id for job in jobs.submitted(named("mix")))
    cluster.run("scancel", *others)
    submit(capfd, "mix", "--resume")  # as if whoever submitted had been killed after the array
    assert queue(cluster) == ["mix.evaluate", "mix.reflow", "mix.solve", "mix.solve.parts"]
    array_, *others = (job.id for job in jobs.submitted(named("mix")) if job.id in _waiting(cluster))
    assert array_ == array
    assert cluster.show(others[0])["Dependency"].startswith(f"afterok:{array}_*(")
    cluster.run("scancel", f"{array}_0", *others)
    done = submit(capfd, "mix", "--resume", code=2)
    assert done.err == (
        f"error: job {array}_0 failed while other parts of stage 'solve' are still running or queued in array {array}; "
        "wait for them and resume again, or cancel them with: distill cancel mix\n"
    )
    assert queue(cluster) == ["mix.solve.parts"]


def test_two_that_resume_at_once_submit_once(capfd, cluster, here):
    submit(capfd, "mix.yaml", HELD)
    cluster.run("scancel", *(job.id for job in jobs.submitted(named("mix"))))
    both = [start("submit", "mix", "--resume", cwd=here, log=here / f"{i}.log", env=os.environ) for i in range(2)]
    codes, said = {each.end() for each in both}, [each.said for each in both]
    assert codes <= {0, 2}, said
    assert queue(cluster) == ["mix.evaluate", "mix.reflow", "mix.solve"], said
    assert "Traceback" not in "".join(said)


def test_a_submitter_that_is_killed_in_between_leaves_nothing_to_be_queued_twice(capfd, cluster, here, monkeypatch):
    fake = program(here / "bin", "sbatch", 'REAL "$@"; kill -9 $PPID')
    with monkeypatch.context() as changed:
        changed.setenv("PATH", f"{fake}:{os.environ['PATH']}")
        submitter = start("submit", "mix.yaml", HELD, cwd=here, log=here / "log", env=os.environ)
        assert submitter.end() == -9, submitter.said
    assert queue(cluster) == ["mix.solve"]
    assert jobs.submitted(named("mix")) == []
    submit(capfd, "mix", "--resume")
    first, second, _ = (job.id for job in jobs.submitted(named("mix")))
    assert queue(cluster) == ["mix.evaluate", "mix.reflow", "mix.solve"]
    assert cluster.show(second)["Dependency"] == f"afterok:{first}(unfulfilled)"


def test_all_jobs_are_queued_or_none(capfd, cluster, here, monkeypatch):
    count = here / "count"
    fake = program(
        here / "bin",
        "sbatch",
        f'echo >> {count}; if [ $(wc -l < {count}) = 2 ]; then echo "sbatch: error: full"; exit 1; fi; exec REAL "$@"',
    )
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    done = submit(capfd, "mix.yaml", HELD, code=2)
    assert done.err == "error: Slurm rejected reflow.sbatch: sbatch: error: full\n"
    assert queue(cluster) == []
    assert list((here / "runs").iterdir()) == []


# --- the package, and the lead ---


@pytest.mark.long
def test_an_edited_package_does_not_change_a_queued_job(cluster, here):
    copy = here / "copy"
    for name in ("distill", "recipes", "slurm"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    names = {"kept": "run", "current": "current"}
    submits = [["submit", "solve.yaml", f"--name={name}", f"--code={code}", HELD] for name, code in names.items()]
    both = f"import sys; from distill.cli.main import main; sys.exit(any([main(each) for each in {submits}]))"
    env = {**ENV, **os.environ, "PYTHONPATH": str(copy)}
    subprocess.run([sys.executable, "-c", both], env=env, check=True, capture_output=True)
    (copy / "distill" / "__main__.py").write_text('raise SystemExit("this copy was edited")\n')
    for name in names:
        cluster.run("scontrol", "release", last_job(named(name)))
    states = {name: cluster.wait_state(last_job(named(name)), "COMPLETED", "FAILED") for name in names}
    assert states == {"kept": "COMPLETED", "current": "FAILED"}, said(named("kept"))
    assert "this copy was edited" in said(named("current"))
    noted = {name: next(e for e in read_events(named(name)) if e["event"] == "submitted").get("code") for name in names}
    assert noted == {"kept": None, "current": str(copy)}


@pytest.mark.long
def test_the_lead_grows_with_the_saves(capfd, cluster, here):
    submit(capfd, "solve.yaml", "--time=5", HELD)
    run = named("mix")
    append_event(run, "saved", stage="other", step=1, seconds=100.0)
    first = last_job(run)
    cluster.run("scontrol", "release", first)
    cluster.wait_state(first, "COMPLETED")
    text = (
        "saving took 100 s, so launch.slurm.lead_seconds=180 is too short to save before the time limit; "
        f"`distill submit {run.root} --resume` will use 260 s"
    )
    assert [event["text"] for event in read_events(run) if event["event"] == "warning"] == [text]
    assert f"warning: {text}" in said(run)
    run.stage("solve").done.unlink()
    before = snapshot(here)
    done = submit(capfd, "mix", "--resume", "--time=4", code=2)
    assert done.err == (
        "error: spec 'mix': launch.slurm.lead_seconds: 260 s must be less than the time limit of 240 s (time: "
        "4); increase time, or decrease lead_seconds\n"
    )
    assert snapshot(here) == before
    done = submit(capfd, "mix", "--resume")
    assert "two saves of this run can take 200 s, so launch.slurm.lead_seconds is raised from 180 to 260\n" in done.out
    assert "#SBATCH --signal=B:USR1@260\n" in (run.jobs / "solve.sbatch").read_text()
    assert todo.load_spec(run).launch.slurm.lead_seconds == 260
