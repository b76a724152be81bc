"""The command `distill run --procs N`: killed, stopped, and resumed with other numbers of processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import command
from PIL import Image
from programs.forked import Forked
from runs import ENV, distill, folder_bytes, start, wait_for
from safetensors.torch import load_file

from distill.cli import start as starting
from distill.core.errors import RunError
from distill.execution import preflight, sources
from distill.execution.estimate import estimate
from distill.runs.run_store import RunPaths, read_events
from distill.spec import specfile
from distill.spec.resolved import resolve
from distill.training import checkpoint_files, world

pytestmark = pytest.mark.process

SPEC = """
name: small
data: {kind: digits}
stages:
  teach:
    kind: train
    recipe: pretrain/flow_matching
    network: {kind: unet, channels: [32]}
    images: 640
    batch_size: 32
    optimizer: {lr: 1.0e-4}
    ema_half_lives: [100]
    export: 100
    checkpoint: {images: 32, minutes: null}
launch: {micro_batch: 8, zero_stage: 2, procs: 2, threads: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the spec lies, and an undisturbed run of it."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "small.yaml").write_text(SPEC)
    done = distill("run", "small.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "WARNING" not in done.stderr, "what libraries say is not for users"
    return folder


def run_paths(folder, name):
    return RunPaths(folder / "runs" / name)


def begin(folder, name, *changes, steps=3):
    """A run under way, once it has made some steps."""
    process = start("run", "small.yaml", *changes, "--name", name, cwd=folder, log=folder / f"{name}.log")
    teach = run_paths(folder, name).stage("teach").checkpoints
    assert wait_for(lambda: (teach / f"step-{steps:08d}").exists(), process), (folder / f"{name}.log").read_text()
    return process


def ranks_of(process):
    """Process ids of the ranks, in their order."""
    return sorted(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def student(folder, name):
    return folder_bytes(run_paths(folder, name).student("teach") / "unet")


@pytest.mark.long  # a whole run under ZeRO 2 comes first
def test_the_student_is_the_average_of_the_last_checkpoint(folder):
    run = run_paths(folder, "small")
    ours = load_file(run.student("teach") / "unet" / "diffusion_pytorch_model.safetensors")
    last = checkpoint_files.verified(run.stage("teach").checkpoints / "step-00000020")
    assert all(name.endswith("-of-00002.safetensors") for name in last.meta.files), "each rank wrote its own part"
    theirs = last.tensors("ema.student.100.0")
    assert {f"network.{name}" for name in ours} == theirs.keys()
    assert all(torch.equal(tensor, theirs[f"network.{name}"]) for name, tensor in ours.items())


@pytest.mark.long  # test_ranks kills ranks, test_launch reads what the command says of it
def test_kill_9_of_a_rank_is_named_and_costs_no_bit(folder):
    process = begin(folder, "killed")
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert process.end(30) == 128 + signal.SIGKILL
    said = (folder / "killed.log").read_text()
    lost = "lost contact with another rank, which has exited or hangs"
    assert re.search(rf"^rank 0, (.*step \d+.*|(after )?waiting for the last save): {lost}", said, re.MULTILINE)
    assert "error: rank 1 of run 'killed' was killed by SIGKILL (out of memory?); what it saved is intact" in said
    done = distill("run", "killed", "--resume", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "not be bit-identical" not in done.stderr
    assert student(folder, "killed") == student(folder, "small")


@pytest.mark.long
def test_a_signal_to_the_launcher_saves_once_and_other_processes_go_on(folder):
    process = begin(folder, "moved")
    process.send(signal.SIGUSR1)
    assert process.end(60) == 75
    said = (folder / "moved.log").read_text()
    stopped = re.search(r"^stopped by SIGUSR1; saved: \S+/step-0*(\d+); resume with: distill run", said, re.MULTILINE)
    assert stopped and said.count("stopped by") == 1
    done = distill("run", "moved", "--resume", "--procs", "1", "launch.zero_stage=null", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "procs: 2 -> 1; zero_stage: 2 -> " in done.stderr
    ours, theirs = (
        load_file(run_paths(folder, name).student("teach") / "unet" / "diffusion_pytorch_model.safetensors")
        for name in ("moved", "small")
    )
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() < 1e-4, name
    refused = distill("run", "moved", "--resume", "stages.teach.batch_size=64", cwd=folder)
    assert refused.returncode == 2 and "only launch and data.max_unreadable may change" in refused.stderr


@pytest.mark.long  # a whole run under ZeRO 2 comes first
def test_what_a_user_gets_wrong_is_one_message(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    for changes, message in (
        (
            ["--procs", "3"],
            "launch.procs: stages.teach.batch_size (32) is not a multiple of the 3 processes; change one of them",
        ),
        (["launch.zero_stage=4"], "launch.zero_stage"),
        (["launch.zero_persistence_threshold=0"], "has no effect, because no weights are sharded; remove it, or set"),
    ):
        refused = command(capfd, "run", "small.yaml", "--name", "wrong", *changes)
        assert refused.code == 2 and message in refused.err and "Traceback" not in refused.err
        assert not run_paths(folder, "wrong").root.exists()


@pytest.mark.long
def test_plan_measures_memory_and_leaves_nothing(folder):
    before = sorted(path.name for path in (folder / "runs").iterdir())
    done = distill("plan", "small.yaml", "--measure", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    ranks = json.loads(done.stdout)["memory"]["teach"]
    assert [found["rank"] for found in ranks] == [0, 1]
    ready = preflight.check(resolve(specfile.load(folder / "small.yaml").spec, folder))
    assert ranks[0]["predicted"] == estimate(ready)["teach"]
    assert ranks[0]["saving"] == ranks[1]["saving"] > 0, "each process copies its own part of what is saved"
    for found in ranks:
        assert sum(found["predicted"].values()) == pytest.approx(sum(found["counted"].values()), rel=0.1)
    assert sorted(path.name for path in (folder / "runs").iterdir()) == before


@pytest.mark.long
def test_ranks_read_the_index_that_was_made_with_the_run(folder):
    for i in range(4):
        (folder / "images").mkdir(exist_ok=True)
        Image.effect_noise((8, 8), 50).save(folder / "images" / f"{i}.png")
        os.utime(folder / "images" / f"{i}.png", (1e9, 1e9))
    images = "data={kind: images, path: images, size: 8, channels: 1}"
    done = distill("run", "small.yaml", images, "stages.teach.images=64", "--name", "images", cwd=folder)
    assert done.returncode == 0, done.stderr
    (index,) = (folder / "runs" / "indexes").iterdir()
    events = read_events(run_paths(folder, "images"))
    began = next(event["time"] for event in events if event["event"] == "stage started")
    assert index.stat().st_mtime < began, "the ranks have made it again"


def compare(digests):
    """Whether all ranks have read the same, for each of these: of each rank, the digest of its data."""
    ranks = world.World.join(torch.device("cpu"), 1.0, 0, print)
    for of_rank in digests:
        try:
            given = {"init": "one", "data": of_rank[ranks.rank]}
            sources.refuse_different(given, {"init": "", "data": "/set"}, ranks)
            print("same")
        except RunError as error:
            print(error, flush=True)


@pytest.mark.long
def test_ranks_that_read_different_data_do_not_train(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        Forked(compare, ("aa", "ab"), log=tmp_path / f"rank-{rank}.log", env=shared | {"RANK": str(rank)})
        for rank in range(2)
    ]
    for rank in ranks:
        assert rank.end() == 0, rank.said
        first, second = rank.said.splitlines()
        assert first == "same"
        assert second == (
            "the ranks have read different inputs: data (/set); the files changed while they were read, or differ "
            "between machines. No step was trained with them; make the files identical, then resume"
        )


TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
ACCELERATE = [
    "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2", "--machine_rank", "0",
    "--main_process_ip", "127.0.0.1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
]  # fmt: skip


OF_ACCELERATE = pytest.param(ACCELERATE, id="accelerate", marks=pytest.mark.long)
OF_TORCHRUN = pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.long)


def launch(folder, run, launcher):
    """A process of another launcher, which starts the two ranks of a run; what they say goes to RUN.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with (folder / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, port, "--module", "distill", "stage", str(run.root), "teach"],
            cwd=folder, env=ENV, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def said(folder, run):
    return (folder / f"{run.name}.log").read_text()


@pytest.mark.parametrize("launcher", [OF_TORCHRUN, OF_ACCELERATE])
def test_other_launchers_train_the_same(folder, launcher):
    """torchrun, and the form of `accelerate launch` that sets WORLD_SIZE: the same weights, moments and averages."""
    name = launcher[0].partition(".")[0]
    run = starting.begin(folder / "runs", specfile.load(folder / "small.yaml", name=name))
    assert launch(folder, run, launcher).wait(timeout=300) == 0, said(folder, run)
    assert student(folder, name) == student(folder, "small")
    saved = sorted(run_paths(folder, "small").stage("teach").checkpoints.glob("step-*/*.safetensors"))
    assert saved
    for path in saved:
        again = run.stage("teach").checkpoints / path.parent.name / path.name
        assert again.read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("launcher", [OF_TORCHRUN, OF_ACCELERATE])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_other_launchers_pass_signals_on(folder, launcher, number):
    """The ranks save and exit, the launcher's exit code is 1; the same command resumes to the same bits."""
    name = f"{launcher[0].partition('.')[0]}-{number.name}"
    run = starting.begin(folder / "runs", specfile.load(folder / "small.yaml", name=name))
    process = launch(folder, run, launcher)
    assert wait_for(lambda: (run.stage("teach").checkpoints / "step-00000003").exists(), process), said(folder, run)
    os.kill(process.pid, number)
    assert process.wait(timeout=60) == 1, said(folder, run)
    *_, last = read_events(run)
    assert last["event"] == "stopped", said(folder, run)
    assert last["message"].startswith(f"stopped by {number.name}; saved: "), last
    assert launch(folder, run, launcher).wait(timeout=300) == 0, said(folder, run)
    assert student(folder, name) == student(folder, "small")
