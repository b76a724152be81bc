"""Stages of a run within the test process: where they stop, what student cards say, what a resume refuses."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from hub import pictures as parquet
from PIL import Image
from runs import folder_bytes
from safetensors.torch import load_file

from distill import pairs
from distill.cli.start import begin
from distill.core.errors import InputError, RunError, Stopped
from distill.core.stop import StopRequest
from distill.data import indexed
from distill.exchange import student_card
from distill.exchange.student_card import StudentCard
from distill.execution import devices, preflight, stages, train_stage
from distill.flow.codecs import Pixels
from distill.flow.draws import Rows
from distill.networks.architectures import build
from distill.networks.velocity import VelocityStudent
from distill.runs import results
from distill.runs.run_store import RunPaths
from distill.spec import checks, specfile
from distill.spec.model import CheckpointTeacher, LaunchSpec, MlpSpec, RunSpec, UNetSpec
from distill.spec.resolved import resolve
from distill.students.exporting import export
from distill.students.init import teacher_on_linear_path
from distill.students.loaded import load_student
from distill.teachers import load_teacher
from distill.training import loading
from distill.training.world import ALONE
from recipes.reflow import reflow

CPU = torch.device("cpu")
GAUSSIAN = {"kind": "gaussian", "mean": [1.0, 2.0], "std": [0.5, 0.25]}
PAIRS = {"kind": "pairs", "count": 32, "block": 16, "shard": 16, "steps": 2}
REFLOW = {
    "kind": "train", "recipe": "reflow/reflow", "pairs": "pairs", "network": {"kind": "mlp", "width": 8, "depth": 1},
    "images": 48, "batch_size": 16, "ema_half_lives": [16.0], "checkpoint": {"images": 16, "minutes": None},
}  # fmt: skip
TEACH = {
    **REFLOW, "recipe": "pretrain/flow_matching", "pairs": None, "images": 16, "batch_size": 8,
    "network": {"kind": "unet", "channels": [8]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spec(teacher=GAUSSIAN, data=None, **given):
    content = {"name": "r", "teacher": teacher, "stages": given, **({"data": data} if data else {})}
    return RunSpec.model_validate(content)


def go(tmp_path, given, stop=None):
    run = RunPaths(tmp_path / given.name)
    run.root.mkdir(exist_ok=True)
    stages.run(run, given, list(given.stages), stop or StopRequest())
    return run


# --- devices ---


@pytest.mark.parametrize(("kind", "part"), [("pairs", None), ("pairs", (0, 2)), ("train", None)])
def test_a_stage_needs_a_gpu_for_each_of_its_own_processes_here(tmp_path, monkeypatch, kind, part):
    """A job of Slurm for pairs has one GPU, even if 8 processes train."""
    placed = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(devices, "set_numerics", lambda numerics: None)
    monkeypatch.setattr(stages, "_pairs", lambda work, stage: placed.append(work.device.type) or {})
    given = spec(pairs=PAIRS, straight=REFLOW).model_copy(update={"launch": LaunchSpec(procs=8)})
    run = RunPaths(tmp_path / "r")
    run.root.mkdir()
    if kind == "train":
        with pytest.raises(
            InputError, match=r"^launch\.procs=8, but there are only 1 GPUs, and each process needs one"
        ):
            stages.run(run, given, ["straight"], StopRequest(), replace(ALONE, size=8))
        return
    stages.run(run, given, ["pairs"], StopRequest(), part=part)
    assert placed == ["cuda"]


class ReachedError(Exception):
    """The training would begin here."""


@pytest.fixture
def begun(monkeypatch):
    """The arguments of each training, of which none is done."""
    handed = []

    def begin_training(recipe, init, source, stage, **named):
        handed.append({"source": source, **named})
        raise ReachedError

    def reach(run, given, name):
        with monkeypatch.context() as patch, pytest.raises(ReachedError):
            patch.setattr(train_stage.engine, "train", begin_training)
            stages.run(run, given, [name], StopRequest())
        return handed[-1]

    return reach


def test_networks_that_training_does_not_call_are_spare(tmp_path, begun):
    """Reflow needs a teacher, and does not call it; perflow does."""
    teacher = exported(tmp_path / "teacher", UNetSpec(kind="unet", channels=[8]), (1, 8, 8), None)
    windows = {**TEACH, "recipe": "reflow/perflow", "network": None, "options": {"solver_steps": 1}}
    flow = {**REFLOW, "network": None, "images": 16}
    more = {"fresh": {**windows, "network": TEACH["network"]}, "again": {**flow, "init": "flow"}}
    more["after"] = {**windows, "init": "flow"}
    given = spec(teacher, {"kind": "digits"}, windows=windows, pairs=PAIRS, flow=flow, **more)
    run = RunPaths(tmp_path / "r")
    run.root.mkdir()
    stages.run(run, given, ["pairs", "flow"], StopRequest())
    run.stage("flow").done.unlink()
    found = {name: begun(run, given, name) for name in ("windows", "fresh", "flow", "again", "after")}
    counts = {name: (each["teacher"] is not None, len(each["spare"])) for name, each in found.items()}
    assert counts == {
        "windows": (True, 0), "fresh": (True, 0), "flow": (False, 1), "again": (False, 2), "after": (True, 1),
    }  # fmt: skip
    weights = load_student(run.student("flow"), CPU).network.state_dict()
    spare = found["after"]["spare"][0].state_dict()
    assert spare and all(torch.equal(each, weights[name]) for name, each in spare.items())


def test_networks_that_zero_3_divides_are_made_on_the_cpu(tmp_path, monkeypatch):
    places = []

    def prepare(work, stage, device):
        places.append(device.type)
        raise ReachedError

    monkeypatch.setattr(train_stage, "_training", prepare)
    monkeypatch.setattr(stages.devices, "place", lambda *given: torch.device("meta"))
    for number, launch in enumerate(({}, {"zero_stage": 2}, {"zero_stage": 3}, {"divide_teacher": True})):
        given = spec(pairs=PAIRS, base=REFLOW).model_copy(update={"launch": LaunchSpec(**launch)})
        run = RunPaths(tmp_path / str(number))
        run.root.mkdir()
        with pytest.raises(ReachedError):
            stages.run(run, given, ["base"], StopRequest())
    assert places == ["meta", "meta", "cpu", "cpu"]


def test_the_time_of_encoding_is_no_time_of_waiting(tmp_path, begun, monkeypatch):
    """More workers would not make it shorter, since they do not encode."""
    clock = [0.0]

    class Halves(Pixels):
        def encode(self, pixels):
            clock[0] += 100
            return pixels[..., ::2, ::2]

    monkeypatch.setattr(train_stage, "codec_of", lambda data, own: Halves(is_identity=False))
    monkeypatch.setattr(loading.time, "perf_counter", lambda: clock[0])
    given, run = spec(None, {"kind": "digits"}, teach=TEACH), RunPaths(tmp_path / "r")
    run.root.mkdir()
    training = begun(run, given, "teach")
    assert training["source"].batch(0, Rows(0, 8, 8)).data.shape == (8, 1, 4, 4)
    assert (clock, training["timed"].take()) == ([100], 0.0)


# --- stopping ---


class StopOnceDone(StopRequest):
    """A signal that comes when a stage is done and before the next begins."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def raise_if_requested(self, saved):
        if self.stage.done.exists():
            self.signal = "SIGTERM"
        super().raise_if_requested(saved)


def test_a_signal_between_two_stages_is_not_lost(tmp_path):
    given, run = spec(first=PAIRS, second=PAIRS), RunPaths(tmp_path / "r")
    with pytest.raises(Stopped, match="stopped by SIGTERM; saved: stage first, which is done$"):
        go(tmp_path, given, StopOnceDone(run.stage("first")))
    assert run.stage("first").done.exists()
    assert not run.stage("second").root.exists()
    go(tmp_path, given, StopOnceDone(run.stage("second")))  # after the last one there is nothing left to stop
    assert run.stage("second").done.exists()


def test_a_stage_whose_folder_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "stages").write_text("")
    with pytest.raises(RunError, match=r"cannot create .*r/stages/first: Not a directory; earlier stages are intact"):
        go(tmp_path, spec(first=PAIRS))


# --- export from a checkpoint ---


def test_a_checkpoint_is_exported_without_pairs_or_the_runs_device(tmp_path):
    given = spec(pairs=PAIRS, straight=REFLOW)
    run = go(tmp_path, given)
    shutil.rmtree(run.stage("pairs").root)
    elsewhere = given.model_copy(update={"launch": given.launch.model_copy(update={"device": "cuda"})})
    train_stage.export_checkpoint(run, elsewhere, "straight", "raw", tmp_path / "raw")
    assert folder_bytes(tmp_path / "raw") == folder_bytes(run.student("straight"))
    train_stage.export_checkpoint(run, elsewhere, "straight", 16.0, tmp_path / "averaged")
    card = student_card.verify(tmp_path / "averaged")
    assert (card.weights, card.images) == (16.0, 48)
    average = load_file(next(iter(sorted(run.stage("straight").checkpoints.glob("*3/ema.*")))))
    exported = load_file(tmp_path / "averaged" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, average[f"network.{name}"]) for name, value in exported.items())
    with pytest.raises(InputError, match="stage 'straight' of run 'other' has no checkpoint yet; wait for the first"):
        train_stage.export_checkpoint(RunPaths(tmp_path / "other"), given, "straight", "raw", tmp_path / "none")


class LosesTeacher(StopRequest):
    """Removes a teacher's folder once a checkpoint is saved."""

    def __init__(self, teacher, checkpoints):
        self.teacher, self.checkpoints = teacher, checkpoints
        super().__init__()

    @property
    def signal(self):
        if any(self.checkpoints.glob("step-*")):
            shutil.rmtree(self.teacher, ignore_errors=True)

    @signal.setter
    def signal(self, name):
        assert name is None


def test_a_run_reads_its_teacher_once(tmp_path):
    teacher = exported(tmp_path / "teacher", MlpSpec(kind="mlp", width=8, depth=1), (2,), None)
    given = spec(teacher, pairs=PAIRS, straight={**REFLOW, "network": None})
    stages.run(RunPaths(tmp_path / given.name), given, ["pairs"], StopRequest())
    again = Path(shutil.copytree(tmp_path, tmp_path.with_name("again")))
    run = go(
        tmp_path, given, LosesTeacher(tmp_path / "teacher", tmp_path / "r" / "stages" / "straight" / "checkpoints")
    )
    assert not (tmp_path / "teacher").exists()
    assert student_card.verify(run.student("straight")).images == 48
    shutil.copytree(again / "teacher", tmp_path / "teacher")
    train_stage.export_checkpoint(run, given, "straight", "raw", tmp_path / "raw")
    assert folder_bytes(tmp_path / "raw") == folder_bytes(run.student("straight"))


# --- what a student says of itself ---


def exported(folder, network, shape, num_classes):
    """A teacher's folder."""
    card = StudentCard(
        name="t", recipe="r", spec_digest="0" * 64, teacher_digest=None, num_classes=num_classes,
        null_class=num_classes, shape=shape, weights="raw", images=1,
    )  # fmt: skip
    export(VelocityStudent(build(network, shape, num_classes, seed=0)), folder, card)
    return {"kind": "diffusers", "path": str(folder)}


@pytest.fixture
def conditional(tmp_path):
    """An MLP of two classes and a null class."""
    return exported(tmp_path / "teacher", MlpSpec(kind="mlp", width=8, depth=1), (2,), 2)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["windows"], id="windows"),
        pytest.param(["windows", "fresh", "pairs", "beside", "tuned"], id="all", marks=pytest.mark.long),
    ],
)
def test_labels_that_a_teacher_does_not_know_are_left_out(tmp_path, names):
    teacher = exported(tmp_path / "teacher", UNetSpec(kind="unet", channels=[8]), (1, 8, 8), None)
    windows = {**TEACH, "recipe": "reflow/perflow", "network": None, "images": 8, "options": {"solver_steps": 1}}
    beside = {**REFLOW, "network": None, "images": 16, "options": {"data_weight": 0.1}}
    tuned = {**TEACH, "network": None, "init": "windows", "images": 8}
    fresh = {**windows, "network": TEACH["network"]}
    stages = {"windows": windows, "fresh": fresh, "pairs": PAIRS, "beside": beside, "tuned": tuned}
    run = go(tmp_path, spec(teacher, {"kind": "digits"}, **{name: stages[name] for name in names}))
    assert {student_card.read(run.student(name)).num_classes for name in names if name != "pairs"} == {None}


def test_labels_that_are_left_out_are_spoken_of_and_a_column_without_effect_is_refused(tmp_path, capsys):
    teacher = exported(tmp_path / "teacher", UNetSpec(kind="unet", channels=[8]), (1, 8, 8), None)
    windows = {**TEACH, "recipe": "reflow/perflow", "network": None, "images": 8, "options": {"solver_steps": 1}}
    preflight.check(resolve(spec(teacher, {"kind": "digits"}, windows=windows), tmp_path))
    said = "has 10 classes, but the teacher (UNet2DModel from teacher) is unconditional: its students are trained"
    assert said in capsys.readouterr().err
    column = {"kind": "hf", "path": str(parquet(tmp_path / "data", [0, 1] * 8)), "size": 8, "channels": 1}
    labelled = {**column, "label_column": "label"}
    preflight.check(resolve(spec(teacher, column, windows=windows), tmp_path))
    assert "note: data" not in capsys.readouterr().err
    with pytest.raises(InputError, match=r"data\.label_column=label has no effect: the teacher .* is unconditional"):
        preflight.check(resolve(spec(teacher, labelled, windows=windows), tmp_path))
    preflight.check(resolve(spec(teacher, labelled, windows=windows, taught=TEACH), tmp_path))
    assert "note: data" in capsys.readouterr().err


def test_a_student_says_the_guidance_that_is_in_it(tmp_path, conditional):
    student = {**REFLOW, "network": None}
    run = go(tmp_path, spec(
        conditional,
        plain_pairs=PAIRS, plain={**student, "pairs": "plain_pairs"},
        pairs={**PAIRS, "guidance_scale": 1.5}, guided=student,
        again_pairs={**PAIRS, "teacher": "guided"}, again={**student, "teacher": "guided", "pairs": "again_pairs"},
    ))  # fmt: skip
    said = {name: student_card.read(run.student(name)).guidance_scale for name in ("plain", "guided", "again")}
    assert said == {"plain": 1.0, "guided": 1.5, "again": 1.5}
    assert "| guidance | scale 1.5, learned in training |" in (run.student("again") / "README.md").read_text()
    straight = load_teacher(CheckpointTeacher(path=str(run.student("plain"))), torch.device("cpu"))
    with pytest.raises(
        InputError, match="has no unconditional prediction, because it was trained only on its teacher's outputs"
    ):
        straight.guided(2.0)


@pytest.mark.parametrize(
    "recipe",
    [
        "consistency/consistency",
        "shortcut/shortcut",
        pytest.param("shortcut/meanflow", marks=pytest.mark.long),
        pytest.param("score/dmd2", marks=pytest.mark.long),
    ],
)
def test_a_recipe_bakes_guidance_in_too(tmp_path, recipe):
    student = {
        **TEACH, "recipe": recipe, "network": None, "teacher": "teach", "images": 8, "options": {"guidance_scale": 2.0},
    }  # fmt: skip
    run = go(tmp_path, spec(None, {"kind": "digits"}, teach=TEACH, student=student))
    card = student_card.verify(run.student("student"))
    assert (card.kind, card.guidance_scale, card.unconditional) == ("flow_map", 2.0, False)
    assert student_card.read(run.student("teach")).unconditional
    text = (run.student("student") / "README.md").read_text()
    assert "| guidance | scale 2.0, learned in training |" in text and f"`{recipe}`" in text


@pytest.mark.long
def test_a_student_that_was_shown_dropped_classes_can_be_guided(tmp_path):
    options = {"guidance_sync": True, "label_dropout": 0.5, "solver_steps": 1}
    shown = {**TEACH, "recipe": "reflow/perflow", "network": None, "teacher": "teach", "images": 8, "options": options}
    run = go(tmp_path, spec(None, {"kind": "digits"}, teach=TEACH, shown=shown))
    card = student_card.read(run.student("shown"))
    assert (card.guidance_scale, card.unconditional) == (1.0, True)
    student = load_teacher(CheckpointTeacher(path=str(run.student("shown"))), torch.device("cpu"))
    assert student.guided(2.0).guidance_scale == 2.0


@pytest.mark.long
def test_a_student_trains_with_a_dropout_of_its_own(tmp_path):
    student = {**REFLOW, "network": None, "teacher": "teach", "images": 32}
    teach = {**TEACH, "network": {**TEACH["network"], "dropout": 0.5}}
    pairs = {**PAIRS, "teacher": "teach"}
    given = spec(None, {"kind": "digits"}, teach=teach, pairs=pairs, wet=student, dry={**student, "dropout": 0.0})
    run = go(tmp_path, given)
    configs = {name: json.loads((run.student(name) / "unet" / "config.json").read_text()) for name in given.stages
               if name != "pairs"}  # fmt: skip
    assert {name: config["dropout"] for name, config in configs.items()} == {"teach": 0.5, "wet": 0.5, "dry": 0.0}


def test_the_terms_of_a_teacher_pass_on_to_its_students(tmp_path):
    """From the model card of a checkpoint to its student, and from that to the student's own."""
    teacher = tmp_path / "teacher"
    DDPMPipeline(build(UNetSpec(kind="unet", channels=[8, 8]), (1, 8, 8), None, 0), DDPMScheduler()).save_pretrained(
        teacher
    )
    (teacher / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    train = {**REFLOW, "network": None, "images": 16}
    given = spec(
        {"kind": "diffusers", "path": str(teacher)},
        pairs=PAIRS,
        first=train,
        more={**PAIRS, "teacher": "first"},
        second={**train, "teacher": "first", "pairs": "more"},
    )
    run = go(tmp_path, given)
    for stage in ("first", "second"):
        assert student_card.verify(run.student(stage)).license == "cc-by-nc-4.0"
        text = (run.student(stage) / "README.md").read_text()
        assert "\nlicense: cc-by-nc-4.0\n" in text
        assert "\ncc-by-nc-4.0: the teacher's terms, passed on.\n" in text


def test_a_student_says_what_was_measured(tmp_path):
    evaluate = {
        "kind": "evaluate", "students": {"straight": [1, 2]}, "teacher_steps": [1], "samples": 32, "fine_steps": 2,
    }  # fmt: skip
    given = spec(pairs=PAIRS, straight=REFLOW, evaluate=evaluate)
    run = go(tmp_path, given)
    folder, row = run.student("straight"), results.load_results(run.stage("evaluate")).row("straight", 2)
    card = student_card.verify(folder)  # the checksum of the new README among them
    assert card.metrics["SW2@2"] == pytest.approx(row.distance, rel=1e-5)
    assert card.metrics["rms@2"] == pytest.approx(row.rms, rel=1e-5)
    names = ("SW2", "KID", "precision", "recall", "rms", "straightness", "best baseline SW2")
    assert set(card.metrics) == {f"{name}@{steps}" for name in names for steps in (1, 2)}
    text = (folder / "README.md").read_text()
    assert "| NFE | SW2 | KID | precision | recall | rms | straightness | best baseline SW2 |" in text
    assert f"| 2 | {card.metrics['SW2@2']:.4g} | " in text

    # killed while writing it, resumed: the same bytes, nothing beside them
    whole = folder_bytes(folder)
    (folder / "README.md").write_text("")
    (folder / ".distill.json.tmp-1").write_text("{")
    run.stage("evaluate").done.unlink()
    go(tmp_path, given)
    assert folder_bytes(folder) == whole

    # lost and exported again, with what was measured before
    shutil.rmtree(folder)
    run.stage("straight").done.unlink()
    go(tmp_path, given)
    assert folder_bytes(folder) == whole


# --- flow maps ---

MAP = '''"""Map (Me 2026, arXiv 2601.00001): jumps to the data of pairs."""
import torch
from pydantic import BaseModel, ConfigDict
from distill.protocols import Loss, Trained, Turn

class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def needs(self):
        return frozenset({"teacher", "pairs"})

    @property
    def student(self):
        return "flow_map"

class Recipe:
    sampler = "renoise"

    def __init__(self, config, teacher):
        assert (teacher.field.interpolant.name, teacher.field.t_range) == ("linear", (0.0, 1.0))
        self.teacher = teacher

    def networks(self, init):
        return {"student": Trained(init.flow_map())}

    def turns(self, step, images):
        yield Turn("student", self.loss)

    def loss(self, nets, batch, ctx):
        noise, data, t = batch.pairs.noise, batch.pairs.data, ctx.draw.uniform("t", batch.pairs.data)
        assert self.teacher.field(noise, torch.ones_like(t), batch.cond).isfinite().all()
        x_t = nets["student"].interpolant.mix(data, noise, t)
        u = nets["student"](x_t, t, torch.zeros_like(t), batch.cond)
        return Loss((u - (noise - data)).square().mean())
'''


def with_map(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "map.py").write_text(MAP)
    return {**REFLOW, "recipe": "./map.py"}


@pytest.mark.long
def test_flow_maps_are_trained_continued_exported_and_measured(tmp_path):
    jumps = with_map(tmp_path)
    evaluate = {"kind": "evaluate", "students": {"map": [1, 2], "again": [2]}, "samples": 16, "fine_steps": 2,
                "baselines": []}  # fmt: skip
    given = spec(
        pairs=PAIRS,
        map=jumps,
        again={**jumps, "network": None, "init": "map"},
        evaluate={**evaluate, "teacher_steps": [1]},
    )
    checks.check(given, tmp_path / "r")
    preflight.check(resolve(given, tmp_path / "r"))
    run = go(tmp_path, given)
    card, folder = student_card.verify(run.student("map")), run.student("map")
    assert (card.kind, card.sampler) == ("flow_map", "renoise")
    assert {"rms@1", "rms@2"} < set(card.metrics)
    assert not any(name.startswith("straightness") for name in card.metrics)
    first, again = load_student(folder, CPU), load_student(run.student("again"), CPU)
    assert first.network.gap.weight.abs().max() > 0, "the second time is trained"
    saved = json.loads(next(run.stage("again").checkpoints.glob("*3/meta.json")).read_text())
    assert saved["settings"]["inputs"]["init"] == first.digest
    moved = (again.network.gap.weight - first.network.gap.weight).abs().max()
    assert 0 < moved < first.network.gap.weight.abs().max() * 2, "it went on from there"
    row = results.load_results(run.stage("evaluate")).row("again", 2)
    assert (row.solver, row.nfe) == ("renoise", 2)
    train_stage.export_checkpoint(run, given, "again", "raw", tmp_path / "raw")
    averaged_and_measured = {"distill.json", "README.md"}
    theirs, ours = folder_bytes(run.student("again")), folder_bytes(tmp_path / "raw")
    assert {name for name in ours if ours[name] != theirs[name]} <= averaged_and_measured


def test_a_student_is_made_for_times_of_its_own(tmp_path):
    """They stand in its folder, it is measured along them, and what it is not made for is refused before it begins."""
    own = '    sampler = "euler"\n\n    def t_grids(self, times):\n        return {2: [1.0, 0.75, 0.0]}\n'
    text = Path(reflow.__file__).read_text().replace('    sampler = "euler"\n', own)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "own.py").write_text(text)
    evaluate = {"kind": "evaluate", "samples": 16, "fine_steps": 2, "teacher_steps": [1], "baselines": []}
    student = {**REFLOW, "recipe": "./own.py"}
    given = spec(pairs=PAIRS, own=student, evaluate={**evaluate, "students": {"own": [2]}})
    preflight.check(resolve(given, tmp_path / "r"))
    run = go(tmp_path, given)
    card = student_card.verify(run.student("own"))
    assert card.t_grids == {2: [1.0, 0.75, 0.0]} and "rms@2" in card.metrics
    wrong = spec(pairs=PAIRS, own=student, evaluate={**evaluate, "students": {"own": [2, 4]}})
    said = "stages.evaluate.students.own: this student supports only 2 steps, not 4"
    with pytest.raises(InputError, match=f"^stages.own: {said}"):
        preflight.check(resolve(wrong, tmp_path / "r"))
    along = spec(pairs=PAIRS, own=student, evaluate={**evaluate, "students": {"own": [2]}, "times": {"own": [[1, 0]]}})
    with pytest.raises(
        InputError, match=r"^stages.own: stages.evaluate.times.own: this student supports only its own step times"
    ):
        preflight.check(resolve(along, tmp_path / "r"))
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "own.py").write_text(text)
    with pytest.raises(InputError, match=f"^{said}"):
        go(tmp_path, wrong.model_copy(update={"name": "later"}))
    assert not RunPaths(tmp_path / "later").stage("own").checkpoints.exists(), "refused before it is trained"


BOSS = {**REFLOW, "recipe": "reflow/boss"}
OPTIMAL = {**PAIRS, "paths": "trajectories", "solver": "euler", "steps": 12, "optimal_times": 3}


@pytest.mark.long
def test_a_student_steps_where_its_teacher_errs_least(tmp_path):
    """The pairs stage finds the times, the store keeps them, the pairs and the student have them."""
    teacher = {"kind": "gaussian", "mean": [0.0, 0.0], "std": [0.3**0.5, 0.3**0.5]}
    evaluate = {"kind": "evaluate", "samples": 16, "fine_steps": 2, "teacher_steps": [1], "students": {"boss": [3]},
                "baselines": []}  # fmt: skip
    given = spec(teacher, pairs=OPTIMAL, boss={**BOSS, "images": 32}, evaluate=evaluate)
    checks.check(given, tmp_path)
    preflight.check(resolve(given, tmp_path))
    run = go(tmp_path, given)
    times = [1.0, 0.5, 0.25, 0.0]  # 6, 9 and 12 of 12 steps
    manifest = pairs.PairSet.open(run.stage("pairs").pairs, None).manifest
    assert manifest.times == times
    assert student_card.read(run.student("boss")).t_grids == {3: times}
    (kept,) = (tmp_path / "schedules").iterdir()
    assert json.loads(kept.read_text())["fine"] == 12
    shutil.rmtree(run.stage("pairs").root)
    train_stage.export_checkpoint(run, given, "boss", "raw", tmp_path / "raw")
    assert student_card.read(tmp_path / "raw").t_grids == {3: times}, "also when the pairs are gone"
    wrong = spec(teacher, pairs=OPTIMAL, boss=BOSS, evaluate={**evaluate, "students": {"boss": [3, 4]}})
    said = "stages.evaluate.students.boss: this student supports only 3 steps, not 4"
    with pytest.raises(InputError, match=f"^stages.boss: {said}"):
        preflight.check(resolve(wrong, tmp_path))


def test_paths_of_other_times_are_no_steps_of_one_student(tmp_path):
    ours, theirs = {**PAIRS, "paths": "trajectories", "steps": 4, "times": [1.0, 0.5, 0.0]}, [1.0, 0.75, 0.0]
    boss = {**BOSS, "pairs": {"ours": 0.5, "theirs": 0.5}}
    given = spec(ours=ours, theirs={**ours, "times": theirs}, boss=boss)
    checks.check(given, tmp_path)
    with pytest.raises(InputError, match="stages.boss: reflow/boss: all its pairs stages need the same"):
        preflight.check(resolve(given, tmp_path))
    with pytest.raises(InputError, match="stages.boss.pairs: the pairs stages store different numbers of states per"):
        checks.check(spec(ours=ours, theirs=OPTIMAL, boss=boss), tmp_path)


def test_a_recipe_is_given_its_teacher_on_the_linear_path(tmp_path):
    jumps = with_map(tmp_path)
    network = build(UNetSpec(kind="unet", channels=[8]), (1, 8, 8), None, seed=0)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    teacher = {"kind": "diffusers", "path": str(tmp_path / "ddpm")}
    given = spec(teacher, pairs=PAIRS, map={**jumps, "network": None, "images": 16})
    preflight.check(resolve(given, tmp_path / "r"))
    run = go(tmp_path, given)
    student = load_student(run.student("map"), CPU)
    assert (type(student.network).__name__, student.network.config.path) == ("FlowMapUNet2DModel", "vp")
    loaded = load_teacher(CheckpointTeacher(path=str(tmp_path / "ddpm")), CPU)
    assert student_card.read(run.student("map")).teacher_digest == loaded.digest, (
        "of what it is, not of how it is called"
    )


def test_a_recipe_that_calls_no_teacher_starts_from_the_weights_of_the_specs_one(tmp_path):
    """Consistency tuning: the teacher's licence and digest pass on, and its velocity is where training starts."""
    place = tmp_path / "ddpm"
    DDPMPipeline(build(UNetSpec(kind="unet", channels=[8]), (1, 8, 8), None, seed=0), DDPMScheduler()).save_pretrained(
        place
    )
    (place / "README.md").write_text("---\nlicense: mit\n---\n")
    tune = {**REFLOW, "recipe": "consistency/consistency", "options": {"point": "data"}, "pairs": None, "images": 8}
    tune |= {"network": None, "batch_size": 8, "optimizer": {"lr": 1e-12}, "ema_half_lives": []}
    given = spec({"kind": "diffusers", "path": str(place)}, {"kind": "digits"}, tune=tune)
    found = checks.check(given, tmp_path)
    assert found.recipes["tune"].needs == {"data"} and found.needs("tune") == {"data", "teacher"}
    assert preflight.check(found).built["tune"].teacher is None
    run = go(tmp_path, given)
    teacher, student = load_teacher(CheckpointTeacher(path=str(place)), CPU), load_student(run.student("tune"), CPU)
    card = student_card.read(run.student("tune"))
    assert (card.teacher, card.teacher_digest, card.license) == ("ddpm", teacher.digest, "mit")
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        expected = teacher_on_linear_path(teacher).field(x, t, {})
        assert (student.student(x, t, torch.zeros(2), {}) - expected).abs().max() <= 1e-5


# --- data ---


def pictures(folder, count=6):
    folder.mkdir()
    for i in range(count):
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(folder / f"{i}.png")
    return {"kind": "images", "path": str(folder), "size": 8, "channels": 1}


def test_images_are_decoded_once_a_run_and_kept_by_no_check(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "_LOADED", {})
    evaluate = {"kind": "evaluate", "teacher": "a", "students": {"b": [1]}, "samples": 16, "teacher_steps": [1]}
    given = spec(None, pictures(tmp_path / "images"), a=TEACH, b=TEACH, evaluate={**evaluate, "fine_steps": 1})
    preflight.check(resolve(given, tmp_path))
    assert not indexed._LOADED
    monkeypatch.setattr("distill.evaluation.metrics.features.TRAIN_IMAGES", 256)
    go(tmp_path, given)
    assert len(indexed._LOADED) == 1
    assert len(list((tmp_path / "indexes").iterdir())) == 1


def test_images_are_indexed_when_a_run_is_made_and_not_again(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "_INDEXES", {})
    given = spec(None, pictures(tmp_path / "images"), teach=TEACH)
    for path in (tmp_path / "images").iterdir():
        os.utime(path, (1e9, 1e9))
    source = specfile.SpecSource(given, tmp_path, "spec.yaml")
    with pytest.raises(InputError, match="none of the 6 images of more has an alpha channel"):
        begin(tmp_path / "runs", replace(source, spec=spec(None, {**pictures(tmp_path / "more"), "background": "white"},
                                                           teach=TEACH)))  # fmt: skip
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["indexes"]  # no run of what is refused
    (refused,) = (tmp_path / "runs" / "indexes").iterdir()
    run = begin(tmp_path / "runs", source)
    monkeypatch.setattr(indexed, "_INDEXES", {})  # as in another process
    (kept,) = {*(tmp_path / "runs" / "indexes").iterdir()} - {refused}
    state = (kept.stat().st_ino, kept.stat().st_mtime_ns)
    stages.run(run, given, ["teach"], StopRequest())
    assert run.stage("teach").done.exists()
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == state


def test_an_export_needs_no_images(tmp_path):
    given = spec(None, pictures(tmp_path / "images"), teach=TEACH)
    run = go(tmp_path, given)
    shutil.rmtree(tmp_path / "images")
    train_stage.export_checkpoint(run, given, "teach", "raw", tmp_path / "out")
    assert load_student(tmp_path / "out", CPU).shape == (1, 8, 8)


@pytest.mark.long
def test_a_teacher_that_is_not_square_is_given_data_of_its_shape(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.evaluation.metrics.features.TRAIN_IMAGES", 256)
    wide = {**pictures(tmp_path / "images"), "size": [4, 8]}
    teacher = go(tmp_path, spec(None, wide, teach=TEACH)).student("teach")
    straight = {**REFLOW, "network": None}
    evaluate = {"kind": "evaluate", "students": {"straight": [1]}, "samples": 16, "teacher_steps": [1], "fine_steps": 1}
    path = {"kind": "diffusers", "path": str(teacher)}
    given = spec(
        path, wide, pairs={**PAIRS, "paths": "forward", "solver": "euler"}, straight=straight, evaluate=evaluate
    )
    given = given.model_copy(update={"name": "wide"})
    preflight.check(resolve(given, tmp_path))
    run = go(tmp_path, given)
    assert load_student(run.student("straight"), CPU).shape == (1, 4, 8)
    found = results.load_results(run.stage("evaluate"))
    assert found.features.task == "rotations" and found.reference == 6
    square = given.model_copy(update={"data": given.data.model_copy(update={"size": 8})})
    with pytest.raises(
        InputError, match=r"data 'images' has samples of shape \[1, 8, 8\], but the .* makes \[1, 4, 8\]; use"
    ):
        preflight.check(resolve(square, tmp_path))


def test_a_resume_refuses_changed_data(tmp_path):
    given = spec(None, pictures(tmp_path / "images"), teach=TEACH)
    run = go(tmp_path, given)
    run.stage("teach").done.unlink()
    go(tmp_path, given)
    run.stage("teach").done.unlink()
    Image.new("L", (8, 8), 99).save(tmp_path / "images" / "3.png")
    with pytest.raises(InputError, match=r'other settings: inputs\.data: "\w{64}" -> "\w{64}"; restore the old'):
        go(tmp_path, given)


def test_a_resume_refuses_another_teacher_and_its_pairs(tmp_path, conditional):
    given = spec(conditional, pairs=PAIRS, straight={**REFLOW, "network": None})
    run = go(tmp_path, given)
    saved = json.loads(next(run.stage("straight").checkpoints.glob("*3/meta.json")).read_text())
    assert saved["settings"]["inputs"].keys() == {"teacher", "init", "pairs"}
    run.stage("straight").done.unlink()
    shutil.rmtree(run.stage("pairs").root)
    changed = given.model_copy(update={"stages": {**given.stages, "pairs": given.stages["pairs"].model_copy(
        update={"steps": 3})}})  # fmt: skip
    with pytest.raises(InputError, match=r"other settings: inputs\.pairs: [^;]* -> [^;]*; restore the old ones"):
        go(tmp_path, changed)


# --- before anything runs ---


@pytest.fixture
def image_teacher(tmp_path):
    network = VelocityStudent(build(RunSpec.model_validate({"name": "x", "stages": {"t": TEACH}}).stages["t"].network,
                                    (1, 8, 8), None, seed=0))  # fmt: skip
    card = StudentCard(
        name="t", recipe="r", spec_digest="0" * 64, teacher_digest=None, num_classes=None, null_class=None,
        shape=(1, 8, 8), weights="raw", images=1,
    )  # fmt: skip
    export(network, tmp_path / "teacher", card)
    return {"kind": "diffusers", "path": str(tmp_path / "teacher")}


def test_what_only_the_networks_can_refuse_is_refused_first(tmp_path, image_teacher):
    trunk = tmp_path / "trunk.safetensors"
    trunk.write_bytes(b"no trunk")
    lpips = {"distance": "lpips", "lpips_trunk": "squeeze", "lpips_path": str(trunk), "lpips_resize": "to_64"}
    one_step = {**REFLOW, "recipe": "reflow/one_step", "options": lpips}
    unet = {"kind": "unet", "channels": [8, 16, 16, 16, 16]}
    for given, said in (
        (
            spec(pairs=PAIRS, jump=one_step),
            r"stages\.jump: lpips_trunk: LPIPS compares images, but samples have shape \[2\]",
        ),
        (
            spec(image_teacher, pairs=PAIRS, jump={**one_step, "network": None}),
            r"stages\.jump: .*trunk\.safetensors",
        ),
        (spec(image_teacher, pairs=PAIRS, straight=REFLOW), r"stages\.straight: network\.kind=mlp is for vectors"),
        (
            spec(image_teacher, pairs=PAIRS, straight={**REFLOW, "network": unet}),
            r"stages\.straight: .*halves the image 4 times, but 8x8 is not a multiple of 16",
        ),
    ):
        with pytest.raises(InputError, match=said):
            preflight.check(resolve(given, tmp_path))
    preflight.check(resolve(spec(image_teacher, pairs=PAIRS, straight={**REFLOW, "network": None}), tmp_path))


def test_an_evaluation_with_too_few_images_is_refused_first(tmp_path):
    evaluate = {"kind": "evaluate", "teacher": "a", "students": {"a": [1]}}
    given = spec(None, pictures(tmp_path / "images", count=3), a=TEACH, evaluate=evaluate)
    with pytest.raises(InputError, match="data 'images' has 3 images, but an evaluation needs at least 4, since"):
        preflight.check(resolve(given, tmp_path))
