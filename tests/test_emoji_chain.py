"""From drawings to students that are prompted: the presets of emoji, cut to a few minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import command
from PIL import Image
from runs import folder_bytes

from distill.cli import emoji
from distill.emoji.images import PICTURED
from distill.runs import results
from distill.runs.run_store import RunPaths
from distill.spec import presets, specfile
from distill.spec.model import TrainStage

pytestmark = [pytest.mark.process, pytest.mark.long, pytest.mark.timeout(1800)]

PROMPTED = """
import sys
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
assert "distill" not in sys.modules
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
for path in sys.argv[2:]:
    drawn, steps = load_file(path), int(path.partition("@")[2].partition(".")[0])
    call = {"num_inference_steps": steps, "guidance_scale": 1.0, "use_resolution_binning": False}
    given = {"latents": drawn["latents"], "output_type": "latent"}
    found = pipe(["red heart", "crab"], **call, **given).images
    assert (found - drawn["samples"]).abs().max() <= 1e-4 * found.abs().max(), path
images = pipe(["red heart", "crab"], **call).images
assert [image.size for image in images] == [(64, 64)] * 2
"""


# Steps of each student whose samples depend on the first noise alone.
STEPS = {"reflow": (1, 4), "one_step": (1,), "consistency": (1,), "shortcut": (1, 4), "meanflow": (1, 4), "dmd2": (1,)}


def cut(stages, place) -> list[str]:
    """The changes of the preset of students that leave a few steps of each stage."""
    found = [f"teacher.path={place / 'teacher'}", f"data.path={place / 'images'}", "name=students"]
    for name, stage in stages.items():
        if isinstance(stage, TrainStage):
            found += [f"stages.{name}.{field}=64" for field in ("images", "export")]
            found += [f"stages.{name}.ema_half_lives=[64]", f"stages.{name}.optimizer.warmup_images=32"]
    found += [f"stages.guided.{field}" for field in ("count=64", "block=32", "shard=64", "steps=2")]
    few = "samples=32", "block=32", "fine_steps=2", "prompt_groups={skin_tones: [skin tone]}"
    return found + [f"stages.evaluate.{field}" for field in few]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("emoji") / "runs"


def test_a_teacher_is_made_in_three_minutes(store, capfd):
    done = command(capfd, "emoji", "--short", "--store", str(store))
    assert done.code == 0, done.err
    teacher = store / emoji.FOLDER / emoji.SHORT / emoji.TEACHER
    index = json.loads((teacher / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtAlphaPipeline" and index["text_encoder"] == ["transformers", "BertModel"]
    assert "published emoji-teacher-short:v1; get it elsewhere with: distill pull" in done.out
    again = command(capfd, "emoji", "--short", "--store", str(store))
    assert (again.code, again.out.count("\n")) == (0, 1) and "the teacher is in" in again.out


def test_a_teacher_that_is_published_is_pulled(store, capfd, tmp_path, monkeypatch):
    """With its images, which are drawn; from a store by its URL into ./runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILL_STORE", f"file://{store}")
    done = command(capfd, "emoji", "--short")
    assert done.code == 0, done.err
    assert "pulled runs/emoji-teacher/short/teacher: " in done.out and "makes the emoji teacher" not in done.out
    made, pulled = store / emoji.FOLDER / emoji.SHORT, tmp_path / "runs" / emoji.FOLDER / emoji.SHORT
    assert folder_bytes(pulled / "images") == folder_bytes(made / "images")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (pulled / "teacher" / weights).read_bytes() == (made / "teacher" / weights).read_bytes()
    refused = command(capfd, "emoji")
    assert refused.code == 2 and "has no published emoji-teacher, and cannot be trained into; give a" in refused.err


def test_each_student_is_trained_measured_exported_and_prompted(store, capfd):
    place = store / emoji.FOLDER / emoji.SHORT
    spec = specfile.load(presets.find("emoji-students")).spec
    done = command(capfd, "run", "emoji-students", *cut(spec.stages, place), "--store", str(store))
    assert done.code == 0, done.err
    run = RunPaths(store / "students")
    found = results.load_results(run.stage("evaluate"))
    assert found.captions[:10] == [each for each in PICTURED if each not in ("stop sign", "soccer ball")]
    assert {row.network for row in found.rows} == {"teacher", *spec.stages["evaluate"].students}
    names = {"FD-efficientnet", "KID-stlpips", "rank", "recall-efficientnet"}
    assert all(names <= row.metrics.keys() for row in found.rows)
    assert found.real.keys() == {"rank"} and "skin_tones" in found.rows[0].groups
    assert {row.guidance_scale for row in found.rows} == {None, 1.0, 2.0, 5.0}
    for name, steps in STEPS.items():
        out = store / f"{name}-whole"
        done = command(capfd, "export", f"students/{name}", "--whole", "--out", str(out), "--store", str(store))
        assert done.code == 0, done.err
        given = ["--prompt", "red heart", "--prompt", "crab", "--device", "cpu"]
        drawn = {str(store / f"{name}@{n}.safetensors"): n for n in steps}
        for path, n in {**drawn, str(store / f"{name}.png"): steps[0]}.items():
            done = command(capfd, "sample", str(out), *given, "--steps", str(n), "--out", path)
            assert done.code == 0, done.err
        prompted = subprocess.run(
            [sys.executable, "-I", "-c", PROMPTED, str(out), *drawn], capture_output=True, text=True, timeout=600
        )
        assert prompted.returncode == 0, prompted.stderr[-2000:]
        with Image.open(store / f"{name}.png") as image:
            assert image.size[0] >= 64


def test_the_rank_of_a_drawing_is_better_than_that_of_another(monkeypatch, tmp_path):
    """The metric trains its network in an evaluation, where gradients are off, and keeps it."""
    import torch

    from distill.emoji import images, ranking
    from distill.emoji.autoencoder import in_range
    from distill.evaluation import judging
    from distill.evaluation.metrics import own

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    rows = images.captioned()[100:1500:100]
    pixels = in_range(torch.stack([torch.tensor(images.drawn(path)) for path, _ in rows]).permute(0, 3, 1, 2))
    texts = [text for _, text in rows]
    metric = own.load("distill.emoji.ranking:rank", ["distill.emoji.ranking:rank"])
    cpu = torch.device("cpu")

    def ranks(shown):
        return judging.judged([metric], cpu, [(pixels, shown)])["rank"]

    ranking._trained.cache_clear()
    right, wrong = ranks(texts), ranks([*texts[1:], texts[0]])
    assert right.median() <= 10 < 50 < wrong.median()
    (kept,) = Path(tmp_path).rglob("*.safetensors")
    before = kept.stat().st_mtime_ns
    ranking._trained.cache_clear()
    assert torch.equal(ranks(texts), right) and kept.stat().st_mtime_ns == before
    kept.write_bytes(b"damaged")
    ranking._trained.cache_clear()
    assert torch.equal(ranks(texts), right)
    ranking._trained.cache_clear()
