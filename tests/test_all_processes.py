"""Pairs and evaluations by several processes: the same bytes and numbers as by one, after kills, too."""

import shutil
import signal
import time
from pathlib import Path

import pytest
from runs import distill, folder_bytes, kill, start

from distill.runs.results import load_results
from distill.runs.run_store import RunPaths

pytestmark = pytest.mark.process

SPEC = """
name: shared
data: {kind: digits}
launch: {threads: 1, device: cpu}
stages:
  teach:
    {kind: train, recipe: pretrain/flow_matching, network: {kind: unet, channels: [8]}, images: 240, batch_size: 30,
    optimizer: {lr: 1.0e-3}}
  pairs: {kind: pairs, teacher: teach, count: 22, block: 4, shard: 8, solver: euler, steps: 3}
  away: {kind: pairs, teacher: teach, count: 12, block: 4, shard: 4, solver: heun, steps: 2, paths: forward}
  chosen: {kind: pairs, teacher: teach, count: 20, block: 4, shard: 4, solver: auto, tolerance: 0.2}
  measure:
    {kind: evaluate, teacher: teach, students: {teach: [1, 2]}, teacher_steps: [1], fine_steps: 8, samples: 70,
    block: 16, baselines: [], metrics: ["programs.image_metrics:brightness", "programs.image_metrics:halves"]}
"""
ENV = {"PYTHONPATH": str(Path(__file__).parent)}
SETS = ["pairs", "away", "chosen"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in which only the teacher is trained."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "spec.yaml").write_text(SPEC)
    process = start("run", "spec.yaml", "--store", "runs", cwd=folder, log=folder / "log", env=ENV)
    wait_for(folder / "runs/shared/stages/teach/done.json")
    kill(process)
    for name in (*SETS, "measure"):
        shutil.rmtree(folder / "runs/shared/stages" / name, ignore_errors=True)
    return RunPaths(folder / "runs/shared")


def wait_for(path: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.02)


def copied(trained, folder):
    return RunPaths(shutil.copytree(trained.root, folder / "runs/shared"))


def resume(run, procs):
    done = distill("run", str(run.root), "--resume", "--procs", str(procs), cwd=run.root.parent, env=ENV)
    assert done.returncode == 0, done.stderr
    return done


def numbers(run):
    """All that was measured, without the speed and the names of files."""
    found = load_results(run.stage("measure")).model_dump(mode="json")
    for row in found["rows"]:
        assert row.pop("images_per_second") > 0
    return found


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    """The run, completed by one process."""
    run = copied(trained, tmp_path_factory.mktemp("alone"))
    resume(run, 1)
    return run


@pytest.mark.parametrize("procs", [2, pytest.param(3, marks=pytest.mark.long)])
def test_several_processes_make_the_same_bytes_and_numbers(trained, alone, procs, tmp_path):
    run = copied(trained, tmp_path)
    resume(run, procs)
    for name in SETS:
        assert folder_bytes(run.stage(name).pairs) == folder_bytes(alone.stage(name).pairs)
    assert numbers(run) == numbers(alone)
    assert len(numbers(run)["rows"]) == 4
    pictures = [folder_bytes(each.stage("measure").root / "pictures") for each in (run, alone)]
    assert pictures[0] == pictures[1]
    assert not (run.stage("measure").root / "endpoints").exists()
    assert (run.logs / "measure.rank-1.log").exists() or any(run.logs.glob("*rank-1*"))


@pytest.mark.long
def test_killed_processes_lose_one_row_at_most(trained, alone, tmp_path):
    run = copied(trained, tmp_path)
    args = ("run", str(run.root), "--resume", "--procs", "2")
    process = start(*args, cwd=tmp_path, log=tmp_path / "log", env=ENV)
    wait_for(run.stage("pairs").pairs / "manifest.json")
    kill(process)
    process = start(*args, cwd=tmp_path, log=tmp_path / "log", env=ENV)
    rows = run.stage("measure").root / "rows"
    wait_for(rows / "teacher-heun-8.json")
    kill(process)
    kept = {path: path.stat().st_mtime_ns for path in rows.glob("*.json")}
    resume(run, 3)  # the samples of the fine solver are read by other processes than those that made them
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    for name in SETS:
        assert folder_bytes(run.stage(name).pairs) == folder_bytes(alone.stage(name).pairs)
    assert numbers(run) == numbers(alone)


@pytest.mark.long
def test_a_damaged_part_of_the_fine_solver_is_made_again(trained, alone, tmp_path):
    run = copied(trained, tmp_path)
    for name in SETS:
        shutil.copytree(alone.stage(name).root, run.stage(name).root)
    process = start("run", str(run.root), "--resume", cwd=tmp_path, log=tmp_path / "log", env=ENV)
    wait_for(run.stage("measure").root / "rows/teacher-heun-8.json")
    kill(process)
    (run.stage("measure").root / "endpoints/000002.safetensors").write_bytes(b"damaged")
    resume(run, 2)
    assert numbers(run) == numbers(alone)


def test_what_a_rank_refuses_is_said(trained, tmp_path):
    run = copied(trained, tmp_path)
    spec = run.root / "spec.yaml"
    spec.write_text(spec.read_text().replace("image_metrics:brightness", "image_metrics:infinite"))
    done = distill("run", str(run.root), "--resume", "--procs", "2", cwd=tmp_path, env=ENV)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the metric infinite returned a tensor [64] float32 with NaN or infinity" in done.stderr


@pytest.mark.long
def test_a_signal_stops_all_ranks_after_a_block(trained, alone, tmp_path):
    run = copied(trained, tmp_path)
    for name in SETS:
        shutil.copytree(alone.stage(name).root, run.stage(name).root)
    process = start("run", str(run.root), "--resume", "--procs", "2", cwd=tmp_path, log=tmp_path / "log", env=ENV)
    wait_for(run.stage("measure").root / "endpoints/000001.safetensors")
    process.send(signal.SIGTERM)
    assert process.end() == 75, process.said
    assert "saved: the finished rows of the evaluation" in process.said and "Traceback" not in process.said
    resume(run, 1)
    assert numbers(run) == numbers(alone)
