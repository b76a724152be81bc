"""`distill plan --gpus`: what a run needs of GPUs that are not here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from commands import command, snapshot
from test_costs import SMALL, small

from distill.cli import gpu_fit, gpu_plan
from distill.execution import run_costs
from distill.execution.rehearsal import rehearse
from distill.launch import sites
from distill.plans import device_kinds, facts
from distill.spec import presets, specfile

SPEC = """
name: far
teacher: {path: your/teacher, dtype: bfloat16}
data: {kind: images, path: missing, captions: true, size: 128}
stages:
  cache: {kind: cache}
  pairs: {kind: pairs, count: 1024, solver: euler, steps: 10, guidance_scale: 2}
  reflow: {kind: train, recipe: reflow/reflow, pairs: pairs, images: 6400, batch_size: 64, precision: bf16,
    optimizer: {lr: 1.0e-4}}
  tune: {kind: train, recipe: consistency/consistency, lora: {student: {rank: 2}}, images: 3200, batch_size: 32,
    precision: bf16, optimizer: {lr: 1.0e-4}}
"""


COUNTED = {}


def counted_once(networks, stage, *asked):
    """What `rehearse` counts. It takes seconds, and most tests here plan the same stages with the same model."""
    key = repr((stage, asked))
    if key not in COUNTED:
        COUNTED[key] = rehearse(networks, stage, *asked)
    return COUNTED[key]


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """A spec whose teacher and data are not here. The networks of published models are small ones."""
    models = {name: small(name) for name in SMALL}
    monkeypatch.setattr(facts, "facts_of", models.__getitem__)
    monkeypatch.setattr(run_costs, "rehearse", counted_once)
    (tmp_path / "far.yaml").write_text(SPEC)
    return str(tmp_path / "far.yaml")


def plan(capfd, tmp_path, *args):
    return command(capfd, "plan", *args, "--store", str(tmp_path / "runs"))


def test_a_plan_needs_neither_weights_nor_data_nor_gpus(spec, tmp_path, capfd):
    before = snapshot(tmp_path)
    done = plan(capfd, tmp_path, spec, "--gpus", "8xh100", "--model", "sdxl")
    assert done.code == 0, done.err
    assert snapshot(tmp_path) == before
    assert "plan of run 'far' with SDXL base 1.0, on NVIDIA H100 SXM 80 GB" in done.out
    assert "launch:\n  nodes: 1\n  procs: 8\n" in done.out
    for words in ("assumed: 40.0% of the peak speed", "attention as in the kernel 'flash'", "steps below 0.02 s"):
        assert words in done.out
    assert done.err.count("counting what an update of stage") == 2


def test_numbers_follow_from_counts_and_speeds(spec, tmp_path, capfd):
    args = (spec, "--gpus", "8xh100", "--model", "sdxl", "--utilisation", "0.5", "--json")
    done = plan(capfd, tmp_path, *args, "--nodes", "1..4")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [(each["nodes"], each["gpus_per_node"]) for each in found["plans"]] == [(1, 8), (2, 8), (4, 8)]
    for each in found["plans"]:
        best = each["layouts"][0]
        seconds = sum(one["seconds"] for one in best["trainings"].values())
        assert best["gpu_hours"] == pytest.approx(seconds * 8 * each["nodes"] / 3600)
        for name, batch in (("reflow", 64), ("tune", 32)):
            again = best["launch"].get("activation_checkpointing", False)
            operations = found["trainings"][name]["operations"]["recomputed" if again else "kept"]
            step = best["trainings"][name]["step"]
            assert step["compute"] == pytest.approx(batch / 8 / each["nodes"] * operations / (989.4e12 * 0.5))
    forward = found["sampling_hours"][0]["pairs"] * 3600 * 8 * 989.4e12 * 0.5 / (1024 * 10 * 2)
    assert 2.9 < found["trainings"]["reflow"]["operations"]["kept"] / forward < 3.1  # a backward pass costs two forward
    assert found["trainings"]["tune"]["frozen_bytes"] < found["trainings"]["reflow"]["trained"] * 2.01


def test_a_measured_step_replaces_the_utilisation(spec, tmp_path, capfd):
    args = (spec, "--gpus", "8xh100", "--model", "sdxl", "--json", "launch.procs=8", "--measured", "reflow=2.0")
    found = json.loads(plan(capfd, tmp_path, *args).out)
    plain = next(each for each in found["plans"][0]["layouts"] if each["launch"] == {})
    step = plain["trainings"]["reflow"]["step"]
    assert step["compute"] + step["waiting"] + step["update"] == pytest.approx(2.0)
    assert found["assumed"]["utilisation"] < 1e-3


def test_a_batch_that_cannot_be_divided_is_left_out(spec, tmp_path, capfd):
    done = plan(capfd, tmp_path, spec, "--gpus", "8xh100", "--nodes", "4..16", "--model", "sdxl", "--json")
    assert [each["nodes"] for each in json.loads(done.out)["plans"]] == [4]
    assert "left out, as the batches cannot be divided evenly among their GPUs: 8, 16 nodes" in done.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nodes", "2"], "--nodes: no effect without --gpus"),
        (["--model", "sdxl", "--utilisation", "0.3"], "--model, --utilisation: no effect without --gpus"),
        (["--gpus", "8xh100", "--measure"], "--gpus and --measure"),
        (["--gpus", "8x"], "8x given; valid: the GPUs of a node, like 8xh100"),
        (["--gpus", "8xh10"], "no kind of GPU 'h10' is known; did you mean 'h100'?"),
        (["--gpus", "8xh100", "--nodes", "0"], "--nodes 0: valid: a number from 1 to 100,000, or a range like 1..128"),
        (["--gpus", "8xh100", "--nodes", "4..2"], "--nodes 4..2: valid"),
        (["--gpus", "8xh100", "--nodes", "4.."], "--nodes 4..: valid"),
        (["--gpus", "8xh100", "--nodes", "8"], "cannot be divided evenly among 64 GPUs or more; change batch_size"),
        (["--gpus", "8xh100", "--measured", "reflow=1", "--utilisation", "0.3"], "--utilisation and --measured both"),
        (["--gpus", "8xh100", "--measured", "reflow"], "--measured reflow: valid: a train stage and seconds, like"),
        (["--gpus", "8xh100", "--measured", "reflow=-1"], "--measured reflow=-1: valid"),
        (["--gpus", "8xh100", "--measured", "reflw=1"], "no train stage 'reflw'; did you mean 'reflow'?"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_anything_is_counted(args, message, spec, tmp_path, capfd):
    done = plan(capfd, tmp_path, spec, *args)
    assert done.code == 2 and message in done.err and "counting" not in done.err


def test_a_spec_without_training_is_refused(tmp_path, capfd):
    (tmp_path / "pairs.yaml").write_text(
        "name: p\nteacher: {kind: gaussian, mean: [0, 0], std: [1, 1]}\nstages:\n  p: {kind: pairs, count: 8}\n"
    )
    done = plan(capfd, tmp_path, str(tmp_path / "pairs.yaml"), "--gpus", "8xh100", "--measured", "p")
    assert done.code == 2 and "--gpus: no stage of this spec trains; leave it out" in done.err


def test_a_spec_of_which_nothing_can_be_counted_is_refused(spec, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(run_costs, "rehearse", lambda *_: (_ for _ in ()).throw(run_costs.UNCOUNTED[0]("values")))
    done = plan(capfd, tmp_path, spec, "--gpus", "8xh100", "--model", "sdxl")
    assert done.code == 2 and "--gpus: no train stage of this spec can be counted before it runs" in done.err
    assert done.err.count("cannot be counted: its recipe reads values") == 2


def test_an_unknown_model_is_refused(tmp_path, capfd):
    (tmp_path / "far.yaml").write_text(SPEC)
    done = plan(capfd, tmp_path, str(tmp_path / "far.yaml"), "--gpus", "8xh100", "--model", "flux")
    assert done.code == 2 and "no facts about a model 'flux' are known; " in done.err


def test_a_measured_time_that_cannot_be_is_refused(spec, tmp_path, capfd):
    args = (spec, "--gpus", "8xh100", "--model", "sdxl", "launch.procs=8", "--measured", "reflow=1e-9")
    done = plan(capfd, tmp_path, *args)
    assert done.code == 2 and "--measured: a step of 1e-09 s leaves no time to compute" in done.err


def test_what_fits_nowhere_is_said(spec, tmp_path, capfd, monkeypatch):
    from distill.execution import layouts

    monkeypatch.setattr(layouts, "RESERVE", 1.0)
    done = plan(capfd, tmp_path, spec, "--gpus", "8xh100", "--model", "sdxl")
    assert done.code == 0 and "nothing fits on 1 node with 8 GPUs each" in done.out


@pytest.mark.parametrize(
    ("text", "expected"), [("3", [3]), ("1..128", [1, 2, 4, 8, 16, 32, 64, 128]), ("3..10", [3, 4, 8, 10])]
)
def test_ranges_of_nodes_have_their_ends_and_powers_of_two(text, expected):
    assert gpu_plan.node_counts(text) == expected


def test_the_teacher_of_a_spec_is_counted_as_it_is(tmp_path, capfd):
    done = plan(capfd, tmp_path, "digits", "--gpus", "1x24GB", "--json")
    found = json.loads(done.out)
    assert found["model"] == "the spec's teacher" and found["gpu"]["title"] == "NVIDIA GeForce RTX 4090 24 GB"
    assert list(found["trainings"]) == ["teach", "reflow", "one_step"]


# --- what `distill submit` refuses ---


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site.yaml").write_text("gpus: 24GB")
    return str(tmp_path / "site.yaml")


def submit(capfd, tmp_path, site, *args):
    store = str(tmp_path / "runs")
    asked = ("--gpus-per-node", "2", "--dry-run", "--site", site, "--store", store)
    return command(capfd, "submit", "digits", *asked, *args)


def with_memory(monkeypatch, count):
    kind = replace(device_kinds.kind_of("rtx-4090"), memory=count)
    monkeypatch.setattr(device_kinds, "KINDS", {"rtx-4090": kind})
    monkeypatch.setattr(device_kinds, "kind_or_memory", lambda text: kind)


def said(capfd, tmp_path, site):
    """What is printed before jobs are queued."""
    source = specfile.load(presets.find("digits"), ["launch.slurm.gpus_per_node=2", "launch.procs=2"])
    capfd.readouterr()
    gpu_fit.checked(source, sites.load(Path(site)), tmp_path / "runs", new=True, force=False)
    return capfd.readouterr().out


def test_submit_predicts_memory_and_time_of_the_gpus_of_the_site(site, tmp_path, capfd):
    out = said(capfd, tmp_path, site)
    assert "of it activations" in out and "GPU-hours" in out
    assert f"for 2 x NVIDIA GeForce RTX 4090 24 GB, as {site} states" in out
    done = submit(capfd, tmp_path, site)
    assert done.code == 0 and done.out.startswith("# --- teach.sbatch"), "scripts alone, which may be piped to a file"


def test_submit_refuses_what_cannot_fit(site, tmp_path, capfd, monkeypatch):
    with_memory(monkeypatch, 10**6)
    before = snapshot(tmp_path)
    done = submit(capfd, tmp_path, site)
    assert done.code == 2 and "#SBATCH" not in done.out
    assert "stage 'teach' needs about " in done.err and f"has 1.0 MB (gpus: 24GB in {site})" in done.err
    assert "`distill plan SPEC --gpus 2x24GB` finds settings of launch that fit" in done.err
    assert snapshot(tmp_path) == before
    forced = submit(capfd, tmp_path, site, "--force")
    assert forced.code == 0 and "#SBATCH" in forced.out and "it may not fit" in forced.err


def test_without_the_gpus_of_the_site_only_what_is_known_is_predicted(site, tmp_path, capfd):
    (tmp_path / "site.yaml").write_text("")
    out = said(capfd, tmp_path, site)
    assert "memory per process" in out
    assert "activations are not included; `distill plan SPEC --measure` measures them" in out


def test_force_has_no_effect_on_a_run_that_goes_on(site, tmp_path, capfd):
    done = submit(capfd, tmp_path, site, "--resume", "--force")
    assert done.code == 2 and "--force has no effect with --resume" in done.err


def test_unknown_gpus_of_a_site_are_refused(site, tmp_path, capfd):
    (tmp_path / "site.yaml").write_text("gpus: 79GB")
    done = submit(capfd, tmp_path, site)
    assert done.code == 2 and "gpus" in done.err and "no kind of GPU with 79GB is known" in done.err
