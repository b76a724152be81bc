"""`distill sample` with prompts: they are encoded on the spot, as `distill encode` does it."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import test_teacher_sd3 as sd3
import torch
from commands import command, snapshot
from latent import CPU, load, tokenizer, write
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from students import card, make, relist
from texts import clip

from distill.cli import tools
from distill.evaluation import sample
from distill.exchange import student_card
from distill.spec.model import CheckpointTeacher, GaussianTeacher
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.teachers import encoding
from distill.teachers.of_students import in_size_of

PROMPTS = ["a cat", "two dogs on a hill", "a red house"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny SD 3 in `teacher`, a student of it, and conditions of the prompts."""
    folder = tmp_path_factory.mktemp("prompted")
    texts = {"text_encoder": clip(12, 12, 1), "tokenizer": tokenizer(), "text_encoder_2": clip(12, 12, 2)}
    stock = sd3.pipeline(texts=texts | {"tokenizer_2": tokenizer()})
    path = write(folder / "teacher", stock)
    encoders = encoding.load(encoding.CheckpointTeacher(path=str(path)), CPU, torch.float32)
    rows, null = encoders.encode(PROMPTS, "", 8, lambda done: None)
    encoding.conditions.write(folder / "conditions.safetensors", rows, null, encoders.digest)
    teacher = teacher_on_linear_path(load(path, size=[16, 24], conditions=str(folder / "conditions.safetensors")))
    student = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher).velocity_field().eval()
    export(student, folder / "student", card("student", shape=teacher.shape), teacher.packaging)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(capfd, place, *options, out="s.safetensors", teacher="{{path: {}, size: [16, 24]}}"):
    given = ["--teacher", teacher.format(place / "teacher"), "--out", out, "--device", "cpu"]
    return command(capfd, "sample", str(place / "student"), *options, *given)


def test_samples_are_those_of_the_encoded_prompts_in_turn(capfd, place, here):
    done = draw(capfd, place, "--prompts", str(place / "prompts.txt"), "--count", "5")
    assert (done.code, done.out) == (0, "wrote s.safetensors: 5 samples at 1 step, seed 0\n"), done.err
    kept = f"{{{{path: {{}}, size: [16, 24], conditions: {place / 'conditions.safetensors'}}}}}"
    assert draw(capfd, place, "--count", "5", out="kept.safetensors", teacher=kept).code == 0
    found, expected = load_file("s.safetensors"), load_file("kept.safetensors")
    assert found.keys() == expected.keys() == {"latents", "samples", "class_labels"}
    assert torch.equal(found["samples"], expected["samples"])
    assert found["class_labels"].tolist() == [0, 1, 2, 0, 1]
    with safe_open("s.safetensors", framework="pt") as file:
        assert file.metadata() == {"prompts": '["a cat", "two dogs on a hill", "a red house"]'}
    assert draw(capfd, place, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], out="two.safetensors").code == 0
    torch.testing.assert_close(load_file("two.safetensors")["samples"], found["samples"][:2], rtol=0, atol=1e-6)
    assert not torch.equal(*found["samples"][[0, 3]]), "each sample has noise of its own"


def test_a_picture_shows_the_prompts_in_order(capfd, place, here):
    given = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert draw(capfd, place, *given, out="all.png").code == 0
    assert draw(capfd, place, "--prompt", PROMPTS[0], out="first.png").code == 0
    whole, first = (Image.open(name).convert("RGB") for name in ("all.png", "first.png"))
    factor = 2  # images of 24 x 16 pixels are magnified
    assert (first.size, whole.size) == ((24 * factor, 16 * factor), ((3 * 24 + 2) * factor, 16 * factor))
    assert whole.crop((0, 0, *first.size)).tobytes() == first.tobytes()


def test_the_text_encoders_are_gone_before_the_network_is_loaded(capfd, place, here, monkeypatch):
    loaded, alive = [], []
    of_pipeline, of_student = encoding.load, sample.loaded.load_student

    def load_encoders(*given, **options):
        found = of_pipeline(*given, **options)
        loaded.extend(weakref.ref(each) for each in (found.pipeline.text_encoder, found.pipeline.text_encoder_2))
        return found

    def load_student(*given):
        alive.append([each() for each in loaded])
        return of_student(*given)

    monkeypatch.setattr(encoding, "load", load_encoders)
    monkeypatch.setattr(sample.loaded, "load_student", load_student)
    assert draw(capfd, place, "--prompt", "a cat").code == 0
    assert alive == [[None, None]]
    gc.collect()


@pytest.mark.long
def test_an_evaluation_encodes_prompts_too(capfd, place, here, tmp_path, monkeypatch):
    (tmp_path / "lengths.py").write_text("""
import torch
def length(images, prompts):
    return torch.tensor([float(len(each)) for each in prompts])
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = ["--samples", "16", "--steps", "1", "--teacher-steps", "1", "--baselines", "none", "--data", "none"]
    given = ["eval", str(place / "student"), *rows, "--teacher", str(place / "teacher"), "--device", "cpu"]
    done = command(capfd, *given, "--prompts", str(place / "prompts.txt"), "--out", "a", "--json")
    assert done.code == 0, done.err
    kept = f"{{path: {place / 'teacher'}, size: [16, 24], conditions: {place / 'conditions.safetensors'}}}"
    again = command(capfd, *given[:-3], kept, "--device", "cpu", "--out", "b", "--json")
    found, expected = (json.loads(each.out) for each in (done, again))
    assert found["captions"] == PROMPTS and expected["captions"] == [] and found["latents"]
    assert [row["rms"] for row in found["rows"]] == pytest.approx([row["rms"] for row in expected["rows"]], rel=1e-4)
    more = ["--metrics", "lengths:length", "--guidance-scales", "2", "--guidance-scale", "3"]
    done = command(capfd, *given, "--prompts", str(place / "prompts.txt"), *more, "--out", "d", "--json")
    found = json.loads(done.out)
    lengths = [len(PROMPTS[number % len(PROMPTS)]) for number in range(16)]
    assert {row["metrics"]["length"] for row in found["rows"]} == {sum(lengths) / 16}
    assert found["guidance_scale"] == 3
    (swept,) = (row for row in found["rows"] if row["guidance_scale"] == 2)
    assert swept["solver"] == "heun" and swept["rms"] > 0
    done = command(capfd, *given, "--out", "c")
    assert done.err.endswith("error: student takes prompts; give some with --prompt or --prompts, or with --teacher "
        "'{path: TEACHER, conditions: FILE}' a FILE that `distill encode` has made\n")  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--guidance-scales", "1"], "--guidance-scales: 1 is measured already; list each other scale once"),
        (["--guidance-scales", "a"], "--guidance-scales a: give numbers separated by commas, like 1,0.5,0"),
        (["--guidance-scale", "-1"], "--guidance-scale: -1.0 given; must be at least 0"),
        (["--metrics", "a:x,b:x"], "--metrics: two functions are named 'x', which names their columns; rename one"),
    ],
)
def test_what_an_evaluation_cannot_measure_is_one_message(capfd, place, here, given, said):
    done = command(capfd, "eval", str(place / "student"), *given, "--out", "a")
    assert (done.code, done.err) == (2, f"error: {said}\n")


def test_an_evaluation_leaves_the_defaults_of_the_next_one_unchanged(capfd, place, here):
    done = command(capfd, "eval", str(place / "student"), "--samples", "16", "--device", "cpu", "--out", "a")
    assert done.code == 2 and "its teacher is not known" in done.err
    assert tools.LATENTS == {"samples": 256, "block": 8}


def test_a_teacher_without_size_has_that_of_the_student(capfd, place, here):
    teacher = CheckpointTeacher(path=str(place / "teacher"))
    assert in_size_of((4, 8, 12), teacher) == teacher.model_copy(update={"size": [16, 24]})
    assert in_size_of((4, 8, 8), teacher) is teacher, "its own size"
    other = teacher.model_copy(update={"size": [8, 8]})
    assert in_size_of((4, 8, 12), other) is other
    closed = GaussianTeacher(kind="gaussian", mean=[0.0], std=[1.0])
    assert in_size_of((1,), closed) is closed and in_size_of((1,), None) is None
    assert draw(capfd, place, "--prompt", "a cat", teacher="{{path: {}}}").code == 0
    assert load_file("s.safetensors")["samples"].shape == (1, 4, 8, 12)
    done = draw(capfd, place, teacher="{{path: {}}}")
    assert done.err.startswith("error: student takes prompts; give some with --prompt or --prompts, or with --teacher")


def test_a_complete_pipeline_needs_no_teacher(capfd, place, here):
    """It has the text encoders and the autoencoder of its teacher."""
    whole = shutil.copytree(place / "teacher", here / "whole")
    shutil.copytree(place / "student", whole, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model_index.json"))
    own = student_card.read(whole).model_copy(update={"pipeline": "StableDiffusion3Pipeline"})
    relist(whole, own)
    done = command(capfd, "sample", "whole", "--prompt", "a cat", "--out", "whole.safetensors", "--device", "cpu")
    assert (done.code, done.out) == (0, "wrote whole.safetensors: 1 sample at 1 step, seed 0\n"), done.err
    assert draw(capfd, place, "--prompt", "a cat").code == 0
    assert torch.equal(load_file("whole.safetensors")["samples"], load_file("s.safetensors")["samples"])
    relist(whole, own.model_copy(update={"kind": "flow_map", "sampler": "renoise"}))
    done = command(capfd, "sample", "whole", "--prompt", "a cat", "--out", "map.safetensors", "--device", "cpu")
    assert (done.code, done.out) == (0, "wrote map.safetensors: 1 sample at 1 step, seed 0\n"), done.err


def test_what_cannot_be_drawn_is_refused(capfd, place, here):
    (here / "bytes.txt").write_bytes(b"\xff")
    (here / "empty.txt").touch()
    classes, plain = make(here / "classes", num_classes=5), make(here / "plain")
    before = snapshot(here)

    def refused(*options, **more):
        done = draw(capfd, place, *options, **more)
        assert (done.code, done.err.count("\n")) == (2, 1)
        return done.err.removeprefix("error: ")

    assert refused("--prompts", "bytes.txt") == "bytes.txt: not a text file (UTF-8); give one prompt on each line\n"
    assert refused("--prompts", "empty.txt").startswith("empty.txt: line 1 is empty, and there is no other; give one")
    assert refused("--prompts", "none.txt").startswith("none.txt: cannot be read: No such file or directory; give")
    assert refused("--prompt", " ") == "--prompt: a prompt is empty; give some text\n"
    assert refused("--prompt", "a\x1b[2J").startswith("--prompt a\ufffd[2J: contains a control character or a line")
    said = "--prompt and --prompts cannot be combined; write all prompts into the file\n"
    assert refused("--prompt", "a", "--prompts", "bytes.txt") == said
    assert refused("--prompt", "a", "--classes", "1").startswith("--classes: student takes prompts, so this has no eff")
    assert refused("--prompt", "a", teacher="{{path: {}, conditions: x}}") == (
        "--teacher: conditions=x and prompts were given, but samples have either; remove one of both\n"
    )
    said = f"teacher.path={place / 'student'} has no text encoder; give the folder of a whole pipeline (StableDiffus"
    assert refused("--prompt", "a", teacher=str(place / "student")).startswith(said)
    closed = refused("--prompt", "a", teacher="{{kind: gaussian, mean: [0.0], std: [1.0]}}")
    assert closed.startswith("student: prompts are encoded by the text encoders of its teacher's pipeline; name it")
    for student, said in {
        classes: "classes is conditional on 5 classes, and takes no prompts; use --classes instead of prompts",
        plain: "plain is unconditional, and takes no prompts; leave the prompts out",
    }.items():
        done = command(capfd, "sample", str(student), "--prompt", "a", "--out", "x.png")
        assert (done.code, done.err) == (2, f"error: {said}\n")
    assert snapshot(here) == before
