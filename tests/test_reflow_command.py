"""The command `distill reflow`: rounds straighten the flow of the ring, and kills cost only time."""

import json

import pytest
import torch
from runs import distill, folder_bytes, kill, start, wait_for
from safetensors.torch import load_file

from distill.reports import rounds_table
from distill.runs import results
from distill.runs.run_store import RunPaths, read_events

pytestmark = pytest.mark.process

FEW = [
    "launch.threads=1",
    "stages.pairs.count=4096",
    "stages.pairs.steps=16",
    "stages.pairs.block=256",
    "stages.pairs.shard=256",
    "stages.reflow.network.width=64",
    "stages.reflow.images=128000",
    "stages.reflow.batch_size=256",
    "stages.reflow.optimizer.warmup_images=2560",
    "stages.reflow.checkpoint.images=12800",
    "stages.one_step.images=38400",
    "stages.one_step.batch_size=256",
    "stages.one_step.optimizer.warmup_images=2560",
    "stages.one_step.checkpoint.images=12800",
    "stages.evaluate.fine_steps=16",
    "stages.evaluate.teacher_steps=[1]",
    "stages.evaluate.samples=1024",
    "stages.evaluate.block=512",
]
KILLED = ["pairs-1", "reflow-1", "evaluate-1", "one_step"]
ROUNDS = ["reflow", "mixture-2d", "--rounds", "2", "--distill", *FEW, "--store", "runs"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two rounds and a distillation, undisturbed; and what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    done = distill(*ROUNDS, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunPaths(folder / "runs" / "mixture-2d"), done


def data(run, stage):
    """The data ends of all pairs of a stage."""
    return torch.cat([load_file(path)["data"] for path in sorted(run.stage(stage).pairs.glob("shard-*.safetensors"))])


def moments(samples):
    return samples.mean(0), samples.T.cov()


def test_rounds_straighten_the_ring_and_keep_its_law(whole):
    """1-, 2- and 3-rectified flow: S falls, moments stay, transport does not rise (Liu et al. 2022, thm. 3.5, 3.7)."""
    run, _ = whole
    rounds = rounds_table.rounds(results.of_run(run))
    assert [each.after.network for each in rounds] == ["reflow-1", "reflow-2"]
    for each in rounds:
        print(rounds_table.cells(rounds, each))
        assert each.after.straightness < each.before.straightness
        assert each.after.transport <= 1.005 * each.before.transport  # a convex cost; the flows are approximate
        assert each.after.rms < each.few[1].rms
    assert rounds[0].after.straightness < 0.05 * rounds[0].before.straightness
    first = moments(data(run, "pairs-1"))
    for stage in ("pairs-2", "pairs-distill"):
        mean, cov = moments(data(run, stage))
        assert (mean - first[0]).abs().max() < 0.15  # of a standard deviation of 2.1, from 4,096 samples
        assert (cov - first[1]).abs().max() < 0.25  # of 4.5


def test_what_is_printed_and_reported(whole):
    run, done = whole
    assert done.stdout.count("A -> B: before and after the round, with the same noise") == 3, (
        "after each round and at the end"
    )
    assert done.stdout.count("reflow-2 │") >= 1
    page = run.report.read_text()
    assert "<h2>Rounds</h2>" in page
    warned = [event for event in read_events(run) if event["event"] == "warning"]
    rounds = rounds_table.rounds(results.of_run(run))
    assert [event["text"] for event in warned] == [each.warning for each in rounds if each.warning]
    for each in rounds:
        if each.warning:
            assert done.stderr.count(f"warning: {each.warning}") == 1
            assert done.stdout.count(f"warning: {each.warning}") == 1


def test_flows_begin_with_the_weights_of_the_flow_before_and_all_are_students(whole):
    run, _ = whole
    cards = {path.parent.name: json.loads(path.read_text()) for path in run.students.glob("*/distill.json")}
    assert sorted(cards) == ["one_step", "reflow-1", "reflow-2"]
    assert cards["one_step"]["teacher"] == "the student of stage reflow-2"
    assert cards["one_step"]["metrics"]["SW2@1"] == pytest.approx(
        results.load_results(run.stage("evaluate")).row("one_step", 1).distance, rel=1e-5
    )


def under_way(run, stage):
    """Whether a stage has begun to leave something behind (a checkpoint, a shard, a first row)."""
    paths = run.stage(stage)
    kept = {"pairs": paths.pairs.glob("shard-*"), "evaluate": paths.root.glob("rows/*")}
    return any(kept.get(stage.split("-")[0], paths.checkpoints.glob("step-*")))


@pytest.mark.long  # test_kill_workflow kills runs, too
@pytest.mark.parametrize("stages", [pytest.param(["reflow-1"], id="once"), pytest.param(KILLED, id="each kind")])
def test_killed_it_resumes_to_the_same_bytes(tmp_path, whole, stages):
    undisturbed, _ = whole
    run, log, hit = RunPaths(tmp_path / "runs" / "mixture-2d"), tmp_path / "log", []
    for number, stage in enumerate(stages):
        ways = [[*ROUNDS, "--resume"], ["run", "runs/mixture-2d", "--resume"]]  # both resume
        process = start(*(ways[number % 2] if number else ROUNDS), cwd=tmp_path, log=log)
        assert wait_for(lambda stage=stage: under_way(run, stage), process), log.read_text()
        kill(process)
        if not run.stage(stage).done.exists():
            hit.append(stage)
    assert hit == stages, f"killed in {hit} only; the rest was too fast"
    end = distill("run", "runs/mixture-2d", "--resume", cwd=tmp_path)
    assert end.returncode == 0, end.stdout + end.stderr
    for stage in ("reflow-1", "reflow-2", "one_step"):
        expected, found = folder_bytes(undisturbed.student(stage)), folder_bytes(run.student(stage))
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == [], stage
    for stage in ("pairs-1", "pairs-2", "pairs-distill"):
        assert folder_bytes(run.stage(stage).pairs) == folder_bytes(undisturbed.stage(stage).pairs), stage


TINY = [
    "stages.teach.images=1280",
    "stages.teach.optimizer.warmup_images=0",
    "stages.teach.network.channels=[8, 16]",
    "stages.pairs.count=500",
    "stages.pairs.steps=4",
    "stages.pairs.shard=250",
    "stages.reflow.images=1280",
    "stages.reflow.optimizer.warmup_images=0",
    "stages.evaluate.samples=250",
    "stages.evaluate.fine_steps=4",
    "stages.evaluate.teacher_steps=[]",
    "launch.threads=1",
]


@pytest.mark.long
def test_real_data_in_both_ways_on_digits(tmp_path):
    """Inverted real data among the pairs of each round, by its own teacher, and flow matching beside them."""
    options = ["--rounds", "2", "--forward", "0.25", "--data-weight", "0.1", "stages.forward-2.count=200"]
    done = distill("reflow", "digits", *options, *TINY, "--store", "runs", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunPaths(tmp_path / "runs" / "digits")
    teachers = {}
    for number, count in ((1, round(500 / 3)), (2, 200)):
        manifest = json.loads((run.stage(f"forward-{number}").pairs / "manifest.json").read_text())
        solved = json.loads((run.stage(f"pairs-{number}").pairs / "manifest.json").read_text())
        assert (manifest["paths"], manifest["count"], solved["paths"]) == ("forward", count, "backward")
        assert manifest["teacher_digest"] == solved["teacher_digest"]
        teachers[number] = solved["teacher_digest"]
    assert teachers[1] != teachers[2]
    logs = [e["logs"] for e in read_events(run) if e["event"] == "progress" and e["label"] == "reflow-2"]
    assert logs and all(log["loss"] == pytest.approx(log["pairs"] + 0.1 * log["data"], rel=1e-3) for log in logs)
