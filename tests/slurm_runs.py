"""Runs on a cluster: submits them, follows them by their files, and disturbs them."""

import getpass
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster, missing
from commands import Done, command
from runs import ENV, distill

from distill.runs import jobs
from distill.runs.run_store import RunPaths, read_events

NEEDS_SLURM = [  # where it is not installed; CI fails on any skip
    pytest.mark.process,
    pytest.mark.skipif(bool(missing), reason=f"run `make system`: there is no {', '.join(missing)}"),
]
SPEC = """
name: small
data: {kind: digits}
stages:
  teach:
    kind: train
    recipe: pretrain/flow_matching
    network: {kind: unet, channels: [16, 32]}
    images: 1920
    batch_size: 32
    ema_half_lives: [100]
    checkpoint: {images: 32, minutes: null}
launch: {micro_batch: 8, zero_stage: 2, threads: 1}
"""
MIXTURE = """
name: mix
teacher: {kind: mixture, means: [[1, 1], [-1, 1], [0, -1]], std: 0.2}
stages:
  solve: {kind: pairs, count: 64, block: 8, shard: 8, steps: 4}
  reflow:
    kind: train
    recipe: reflow/reflow
    network: {kind: mlp, width: 16, depth: 2}
    pairs: solve
    images: 320
    batch_size: 16
    checkpoint: {images: 16, minutes: null}
  evaluate: {kind: evaluate, students: {reflow: [1]}, samples: 64, block: 32, teacher_steps: [1], fine_steps: 2}
launch: {threads: 1}
"""
SOLVE = MIXTURE[: MIXTURE.index("  reflow:")] + "launch: {threads: 1}\n"
TEACH = """
name: teach
data: {kind: digits}
stages:
  teach:
    kind: train
    recipe: pretrain/flow_matching
    network: {kind: unet, channels: [8, 8]}
    images: 3200
    batch_size: 16
    checkpoint: {images: 16, minutes: null}
launch: {threads: 1}
"""
HELD = "launch.slurm.options=[--hold]"  # a job that waits for whoever releases it


def enter(cluster: Cluster, folder: Path, monkeypatch) -> Path:
    """Make this process one of a login node's, in a folder with the spec `mix.yaml` and no settings of a user."""
    monkeypatch.chdir(folder)
    for name in ("DISTILL_STORE", "DISTILL_SITE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    monkeypatch.setenv("PATH", cluster.env["PATH"])
    (folder / "mix.yaml").write_text(MIXTURE)
    (folder / "solve.yaml").write_text(SOLVE)
    (folder / "teach.yaml").write_text(TEACH)
    return folder


def command_line(capfd, *arguments: str, code: int = 0) -> Done:
    """`distill ARGUMENTS` in this process, to an exit code."""
    done = command(capfd, *arguments)
    assert done.code == code, done.out + done.err
    return done


def named(name: str) -> RunPaths:
    """A run of the current folder's store."""
    return RunPaths(Path.cwd() / "runs" / name)


def end_jobs(cluster: Cluster) -> None:
    """Empty the queue, whatever is in it."""
    cluster.run("scancel", "--quiet", f"--user={getpass.getuser()}", check=False)
    cluster.wait(lambda: not queue(cluster), 60, "an empty queue")


def begin(*arguments: str) -> subprocess.Popen[str]:
    """`distill ARGUMENTS` in a process of its own, which goes on."""
    command = [sys.executable, "-m", "distill", *arguments]
    env = {**ENV, **os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def queue(cluster: Cluster) -> list[str]:
    """Names of the jobs that wait or run."""
    return sorted(cluster.run("squeue", "--noheader", "--format=%j").split())


def program(folder: Path, name: str, text: str) -> Path:
    """A command of ours in a folder for PATH; REAL stands for the one that it hides."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text.replace('REAL', shutil.which(name) or 'false')}\n")
    path.chmod(0o755)
    return folder


def submit(cluster: Cluster, folder: Path, *arguments: str, code: int = 0):
    """`distill submit ARGUMENTS` in a folder: its output."""
    done = distill("submit", *arguments, cwd=folder, env=cluster.env)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def last_job(run: RunPaths) -> str:
    return jobs.submitted(run)[-1].id


def steps(run: RunPaths) -> int:
    """The newest step that was saved."""
    return max((line["step"] for line in read_events(run) if line.get("event") == "saved"), default=0)


def ends(run: RunPaths, job: str) -> list[tuple[str, bool]]:
    """(why, whether it was queued again) of a job's attempts, in order."""
    return [(line["why"], line["again"]) for line in jobs.ends(run, job)]


def wait_steps(cluster: Cluster, run: RunPaths, attempt: int, more: int = 2, seconds: float = 180) -> None:
    """Until an attempt of the newest job, counted from 0, has saved some steps."""

    def begun() -> bool:
        lines = jobs.history(run, last_job(run))
        return any(line["event"] == "began" and line["restart"] >= attempt for line in lines)

    cluster.wait(begun, seconds, f"attempt {attempt} of {said(run)}")
    begin = steps(run)
    cluster.wait(lambda: steps(run) >= begin + more, seconds, f"step {begin + more} of {said(run)}")


def rank_pid(cluster: Cluster, rank: int) -> int:
    """The process of a rank of whatever the cluster trains."""
    mark, number = f"SLURM_CONF={cluster.folder}/".encode(), f"\0SLURM_PROCID={rank}\0".encode()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = b"\0" + (path / "environ").read_bytes()
            if mark in environment and number in environment and b"stage" in (path / "cmdline").read_bytes():
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"no process has rank {rank}")


def kill_rank(cluster: Cluster, rank: int) -> None:
    os.kill(rank_pid(cluster, rank), signal.SIGKILL)


def said(run: RunPaths) -> str:
    """All logs, for messages."""
    return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(run.logs.glob("*.log")))


def finish(cluster: Cluster, run: RunPaths, job: str, seconds: float = 400) -> None:
    """Until the job has ended well."""
    state = cluster.wait_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=seconds)
    assert state == "COMPLETED", f"{state}\n{said(run)}"
