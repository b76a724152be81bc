"""The commands `distill sample`, `eval`, `pairs`, `report` and `export` on the students of a run."""

import json

import pytest
import torch
from commands import command, snapshot
from PIL import Image
from runs import distill, folder_bytes
from safetensors.torch import load_file

from distill.exchange import student_card
from distill.runs.results import load_results
from distill.runs.run_store import RunPaths

SPEC = """
name: one
data: {kind: digits}
stages:
  teach:
    kind: train
    recipe: pretrain/flow_matching
    network: {kind: unet, channels: [32], layers_per_block: 1}
    images: 256
    batch_size: 64
    ema_half_lives: [1, 8]
    ema_lengths: [0.1, 0.2]
    ema_snapshots: 64
    export: 8
  pairs: {kind: pairs, teacher: teach, count: 96, block: 32, shard: 32, steps: 2}
  reflow: {kind: train, recipe: reflow/reflow, teacher: teach, pairs: pairs, images: 128, batch_size: 64}
  evaluate:
    kind: evaluate
    teacher: teach
    teacher_steps: [1, 2]
    fine_steps: 3
    students: {reflow: [1, 2]}
    samples: 250
"""
pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a small run: a conditional teacher, its reflowed student, their evaluation."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "spec.yaml").write_text(SPEC)
    done = distill("run", "spec.yaml", cwd=folder, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(finished, monkeypatch):
    monkeypatch.chdir(finished)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield RunPaths(finished / "runs" / "one")
    torch.set_num_threads(before)


def test_samples_depend_on_seed_and_index_alone(capfd, run, tmp_path):
    def drawn(name, *options):
        out = tmp_path / f"{name}.safetensors"
        done = command(capfd, "sample", "one/reflow", "--steps", "2", "--out", str(out), *options)
        assert done.code == 0, done.err
        assert done.out.startswith(f"wrote {out}: ")
        return load_file(out)

    few, many, other = drawn("few", "--count", "3"), drawn("many", "--count", "300"), drawn("other", "--seed", "1")
    assert torch.equal(few["latents"], many["latents"][:3])
    torch.testing.assert_close(few["samples"], many["samples"][:3], rtol=0, atol=1e-5)
    assert many["class_labels"][:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert not torch.equal(few["latents"], other["latents"][:3])
    sevens = drawn("sevens", "--count", "3", "--classes", "7")
    assert sevens["class_labels"].tolist() == [7, 7, 7]
    assert torch.equal(sevens["latents"], few["latents"]), "the class is not part of the noise"
    assert drawn("given", "--count", "3", "--classes", "7,0,2")["class_labels"].tolist() == [7, 0, 2]


def test_a_picture_has_a_column_for_each_class(capfd, run, tmp_path):
    out = tmp_path / "grid.png"
    done = command(capfd, "sample", str(run.student("reflow")), "--count", "40", "--out", str(out))
    assert done.out == f"wrote {out}: 40 samples at 1 step, seed 0\n"
    width, height = Image.open(out).size
    assert width / height == pytest.approx(10 / 4, rel=0.1)


def test_what_cannot_be_sampled_is_refused_and_nothing_written(capfd, run, tmp_path):
    def refused(*options):
        done = command(capfd, "sample", *options)
        assert (done.code, done.out, snapshot(tmp_path)) == (2, "", {})
        return done.err

    out = str(tmp_path / "a.png")
    assert "class 10 does not exist; this student knows 0 to 9" in refused(
        "one/reflow", "--classes", "10", "--out", out
    )
    assert "2 classes for 64 samples; give one class" in refused("one/reflow", "--classes", "1,2", "--out", out)
    assert "'one' is a run; name one of its students: one/reflow, one/teach" in refused("one", "--out", out)
    assert "must end in .png" in refused("one/reflow", "--out", str(tmp_path / "a.jpg"))
    assert "is not a folder; create it first" in refused("one/reflow", "--out", str(tmp_path / "none" / "a.png"))


def test_eval_measures_what_the_run_measured(capfd, run, tmp_path):
    """From the same seed: teacher and data are those of the student's run, and the numbers the same."""
    theirs, out = load_results(run.stage("evaluate")), tmp_path / "eval"
    options = ["--steps", "1,2", "--teacher-steps", "1,2", "--samples", "250", "--seed", str(theirs.seed), "--json"]
    done = command(capfd, "eval", "one/reflow", "--out", str(out), *options)
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    ours = {(row["role"], row["solver"], row["steps"]): row for row in rows}
    for row in theirs.rows:
        if not row.fine:
            own = ours[row.role, row.solver, row.steps]
            assert own["distance"] == pytest.approx(row.distance, rel=1e-3)
            assert own["straightness"] == row.straightness
    assert len(list((out / "pictures").glob("*.png"))) == len(rows)
    again = command(capfd, "eval", "one/reflow", "--out", str(out), *options)
    assert json.loads(again.out)["rows"] == rows, "what is there is not measured again, times included"


def test_pairs_of_a_student_are_those_of_any_other_start(capfd, run, tmp_path):
    options = ["--count", "64", "--block", "16", "--shard", "32", "--solver", "euler", "--steps", "2"]
    for name in ("a", "b"):
        done = command(capfd, "pairs", "one/reflow", "--out", str(tmp_path / name), *options)
        assert done.code == 0, done.err
        assert done.out.startswith(f"64 pairs of UNet2DModel from reflow in {tmp_path / name}\n")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert (manifest["nfe"], manifest["done"], len(manifest["shards"])) == (2, True, 2)


def test_a_student_that_learnt_from_pairs_cannot_be_guided(capfd, run, tmp_path):
    options = ["--out", str(tmp_path / "p"), "--guidance-scale", "2", "--count", "32", "--block", "16", "--shard", "32"]
    done = command(capfd, "pairs", "one/reflow", *options)
    assert (done.code, snapshot(tmp_path)) == (2, {})
    assert "has no unconditional prediction, because it was trained only on its teacher's outputs" in done.err
    assert command(capfd, "pairs", "one/teach", *options, "--steps", "2").code == 0


def test_a_report_is_written_again(capfd, run):
    before = run.report.read_bytes()
    run.report.unlink()
    done = command(capfd, "report", "one")
    assert (done.code, done.out) == (0, "runs/one/report.html\n")
    assert run.report.read_bytes() == before


def test_export_gives_any_average_of_the_newest_checkpoint(capfd, run, tmp_path):
    """The half-life that the stage exported gives the same student; the others, and the weights themselves, do not."""

    def exported(name, *options):
        done = command(capfd, "export", "one", "teach", "--out", str(tmp_path / name), *options)
        assert done.code == 0, done.err
        student_card.verify(tmp_path / name)
        return load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")

    kept = load_file(run.student("teach") / "unet" / "diffusion_pytorch_model.safetensors")
    same, raw, fast = exported("same"), exported("raw", "--raw"), exported("fast", "--half-life", "1")
    assert all(torch.equal(same[name], kept[name]) for name in kept)
    short, made = exported("short", "--ema-length", "0.1"), exported("made", "--ema-length", "0.15")
    assert student_card.read(tmp_path / "made").weights == 0.15
    for other in (raw, fast, short, made):
        assert other.keys() == kept.keys()
        assert any(not torch.equal(other[name], kept[name]) for name in kept)
