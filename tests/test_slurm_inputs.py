"""A teacher by hub id on a cluster: fetched when the job is submitted, and read on nodes without network access."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from hub import Hub, environment, pictures, pipeline
from runs import folder_bytes
from slurm_runs import NEEDS_SLURM, finish, last_job, said

from distill.core.records import read_json
from distill.runs.run_store import RunPaths

pytestmark = NEEDS_SLURM

SPEC = """
name: {name}
teacher: {{kind: diffusers, path: {teacher}}}
stages:
  solve: {{kind: pairs, count: 8, block: 4, shard: 4, steps: 2}}
launch: {{threads: 1}}
"""


@pytest.mark.long
def test_the_job_reads_the_commit_of_its_submission_without_the_hub(tmp_path):
    teacher = pipeline(tmp_path / "tiny", 0)
    for name, path in (("hub", "org/tiny"), ("folder", teacher)):
        (tmp_path / f"{name}.yaml").write_text(SPEC.format(name=name, teacher=path))
    with Cluster(1) as cluster, Hub({"models/org/tiny": {"main": teacher}}) as hub:
        env = environment(hub, tmp_path / "home") | {name: cluster.env[name] for name in ("PATH", "SLURM_CONF")}

        def distill(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "distill", *arguments]
            return subprocess.run(
                command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False
            )

        dry = distill("submit", "hub.yaml", "launch.slurm.options=[--hold]", "--dry-run")
        done = distill("submit", "hub.yaml", "launch.slurm.options=[--hold]")
        assert done.returncode == 0, done.stderr
        run = RunPaths(tmp_path / "runs" / "hub")
        assert (run.jobs / "solve.sbatch").read_text() in dry.stdout, "a dry run shows what will be submitted"
        commit = hub.commits["models/org/tiny"]["main"].sha
        assert f"teacher org/tiny@{commit[:12]}: " in done.stderr
        asked = len(hub.requests)
        cluster.run("scontrol", "release", last_job(run))
        finish(cluster, run, last_job(run))
        assert len(hub.requests) == asked, "the job asks nobody"
        unknown = distill("submit", "hub.yaml", "--name=other", "teacher.path=org/nobody")
        assert unknown.returncode == 2 and "org/nobody" in unknown.stderr and "Traceback" not in unknown.stderr
        assert not Path(tmp_path / "runs" / "other").exists()
        assert distill("run", "folder.yaml").returncode == 0, said(run)
    ours, theirs = (tmp_path / "runs" / name / "stages" / "solve" / "pairs" for name in ("hub", "folder"))
    assert read_json(ours / "manifest.json")["teacher_digest"] == read_json(theirs / "manifest.json")["teacher_digest"]
    ours, theirs = (
        {name: content for name, content in folder_bytes(folder).items() if name != "manifest.json"}
        for folder in (ours, theirs)
    )
    assert ours == theirs and len(ours) == 2
    assert json.loads((run.root / "inputs" / "inputs.json").read_text())[0]["commit"] == commit


STREAM = """
name: stream
data: {kind: hf, path: org/x, size: 8, label_column: label, stream: true}
stages:
  teach: {kind: train, recipe: pretrain/flow_matching, network: {kind: unet, channels: [8]}, images: 16, batch_size: 4}
launch: {threads: 1}
"""


@pytest.mark.long
def test_the_job_of_a_stream_reads_the_commit_of_its_submission_from_the_hub(tmp_path):
    (tmp_path / "stream.yaml").write_text(STREAM)
    old, new = pictures(tmp_path / "old", [0, 1, 2, 3]), pictures(tmp_path / "new", [1, 1])
    with Cluster(1) as cluster, Hub({"datasets/org/x": {"main": old, "new": new}}) as hub:
        env = environment(hub, tmp_path / "home") | {name: cluster.env[name] for name in ("PATH", "SLURM_CONF")}
        command = [sys.executable, "-m", "distill", "submit", "stream.yaml", "launch.slurm.options=[--hold]"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        commits = {name: commit.sha for name, commit in hub.commits["datasets/org/x"].items()}
        said_by = (
            f"data org/x (commit {commits['main'][:12]}) is streamed, not downloaded: each process that trains needs"
        )
        assert said_by in done.stdout
        commit = hub.commits["datasets/org/x"]["main"]
        hub.commits["datasets/org/x"] |= {"main": hub.commits["datasets/org/x"]["new"], "old": commit}
        hub.requests.clear()
        run = RunPaths(tmp_path / "runs" / "stream")
        cluster.run("scontrol", "release", last_job(run))
        finish(cluster, run, last_job(run))
    assert hub.requests and all(f"/resolve/{commits['main']}/" in request for request in hub.requests)
    assert run.stage("teach").done.is_file(), said(run)
