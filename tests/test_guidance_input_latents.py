"""The guidance scale as an input of latent-space students: of FLUX.1 dev, which takes it already, and of others."""

import dataclasses
import json

import cached_runs
import pytest
import torch
from commands import command
from diffusers import DiffusionPipeline
from latent_runs import images, run
from safetensors.torch import load_file
from test_presets_for_gpus import flux_dev

from distill import teachers
from distill.core.errors import InputError
from distill.flow.conditioning import between, guidance_of
from distill.spec.guidancespec import GuidanceSpec
from distill.spec.model import CheckpointTeacher
from distill.students.init import StudentInit
from distill.students.loaded import load_student
from distill.teachers import encoding

CPU = torch.device("cpu")
RANGE = (1.5, 5.0)
PROMPTS = ["a red fox", "two cats"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny FLUX.1 dev, and the embeddings of two prompts."""
    here = tmp_path_factory.mktemp("flux")
    flux_dev(here / "teacher")
    spec = CheckpointTeacher(path=str(here / "teacher"), size=[16, 16])
    encoding.write(spec, PROMPTS, here / "prompts.safetensors", CPU)
    return here


def spec_of(place, embedded_guidance=None):
    given = {"path": str(place / "teacher"), "conditions": str(place / "prompts.safetensors"), "size": [16, 16]}
    return given | ({} if embedded_guidance is None else {"embedded_guidance": embedded_guidance})


def test_the_teacher_is_called_once_with_the_scale_of_each_sample(place):
    """As if it were loaded with each of the scales."""
    teacher = teachers.load_teacher(CheckpointTeacher(**spec_of(place)), CPU)
    init = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher, guidance_range=RANGE)
    assert guidance_of(init.conditioning) == RANGE
    x = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    t, indices = torch.tensor([0.3, 0.8]), torch.arange(2)
    cond = between(init.conditioning, init.conditioning.collate(indices), torch.tensor([0.0, 1 - 1e-7]))
    torch.testing.assert_close(cond["guidance"], torch.tensor([1.5, 5.0]))
    found = teacher.guided(RANGE)(x, t, cond)
    for row, scale in enumerate(RANGE):
        other = teachers.load_teacher(CheckpointTeacher(**spec_of(place, embedded_guidance=scale)), CPU)
        expected = other.field(x, t, other.conditioning.collate(indices))
        torch.testing.assert_close(found[row], expected[row], rtol=1e-4, atol=1e-4)
    assert (found[0] - teacher.field(x, t, teacher.conditioning.collate(indices))[0]).abs().max() > 1e-4
    with pytest.raises(InputError, match="guidance: has no effect, because .* takes the guidance scale as an input"):
        dataclasses.replace(teacher, form=GuidanceSpec(interval=(0.1, 0.9))).guided(RANGE)


@pytest.mark.process
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.long)], ids=["whole", "lora"])
def test_a_student_is_sampled_at_any_scale(place, lora, tmp_path, capfd, monkeypatch):
    """Also by the stock pipeline, with its own argument, whose default in the card is the middle of the range."""
    monkeypatch.chdir(tmp_path)
    options = {"levels": 4, "guidance_scale": [*RANGE]}
    stage = {"kind": "train", "recipe": "consistency/consistency", "options": options, "images": 12, "batch_size": 4}
    stage |= {"optimizer": {"lr": 1e-2}} | ({"lora": {"student": {"rank": 2}}} if lora else {})
    data = images(tmp_path / "data", 2, 16, 16)
    teacher = spec_of(place, embedded_guidance=3.5)
    paths = run(tmp_path, {"name": "run", "teacher": teacher, "data": data, "stages": {"student": stage}})
    folder = paths.student("student")
    card = json.loads((folder / "distill.json").read_text())
    assert (card["guidance_range"], card["guidance_scale"], card["embedded_guidance"]) == ([1.5, 5.0], 3.25, 3.25)
    assert card["stock"]["arguments"] == {"guidance_scale": 3.25}
    assert "any scale from 1.5 to 5" in (folder / "README.md").read_text()
    loaded = load_student(folder, CPU, CheckpointTeacher(**teacher))
    assert guidance_of(loaded.conditioning) == RANGE
    out = {}
    where = f"{{path: {place / 'teacher'}, embedded_guidance: 3.5, size: [16, 16]}}"
    for scale in (None, 3.25, 5.0):
        given = ["--prompt", PROMPTS[0], "--teacher", where, "--out", "a.safetensors", "--steps", "2"]
        done = command(capfd, "sample", str(folder), *given, *([] if scale is None else ["--guidance", str(scale)]))
        assert done.code == 0, done.err
        out[scale] = load_file("a.safetensors")
    assert torch.equal(out[None]["samples"], out[3.25]["samples"])
    assert (out[5.0]["samples"] - out[3.25]["samples"]).abs().max() > 1e-4
    done = command(capfd, "sample", str(folder), *given, "--guidance", "7")
    assert (done.code, "--guidance 7: this student was trained for guidance scales from 1.5 to 5" in done.err) == (
        2,
        True,
    )
    if lora:
        return
    base = DiffusionPipeline.from_pretrained(place / "teacher", transformer=None)
    parts = {name: part for name, part in base.components.items() if name not in ("transformer", "scheduler")}
    pipeline = DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    for scale in (3.25, 5.0):
        noise = out[scale]["latents"]
        packed = pipeline._pack_latents(noise, 1, *noise.shape[1:])
        made = pipeline(
            PROMPTS[0], num_inference_steps=1, guidance_scale=scale, latents=packed, height=16, width=16,
            output_type="latent",
        ).images  # fmt: skip
        done = command(capfd, "sample", str(folder), *given[:-1], "1", "--guidance", str(scale))
        own = load_file("a.safetensors")["samples"]
        torch.testing.assert_close(made, pipeline._pack_latents(own, 1, *own.shape[1:]), rtol=0, atol=1e-4)


@pytest.mark.process
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.long)], ids=["whole", "lora"])
def test_a_flow_map_of_a_network_without_this_input_gets_it_beside_the_second_time(lora, tmp_path, capfd, monkeypatch):
    """At any scale, the complete pipeline makes the samples of `distill sample`, in one call per step."""
    monkeypatch.chdir(tmp_path)
    cached_runs.pipeline(tmp_path / "teacher")
    plain = {"path": str(tmp_path / "teacher"), "size": [16, 16]}
    encoding.write(CheckpointTeacher(**plain), PROMPTS, tmp_path / "prompts.safetensors", CPU)
    teacher = {**plain, "conditions": str(tmp_path / "prompts.safetensors")}
    options = {"base": "step", "grid": 4, "guidance_scale": [*RANGE]}
    stage = {"kind": "train", "recipe": "shortcut/shortcut", "options": options, "images": 24, "batch_size": 8}
    stage |= {"optimizer": {"lr": 3e-2}} | ({"lora": {"student": {"rank": 2}}} if lora else {})
    data = images(tmp_path / "data", 2, 16, 16)
    again = {**stage, "init": "first", "images": 8}
    paths = run(tmp_path, {"name": "run", "teacher": teacher, "data": data, "stages": {"first": stage, "s": again}})
    folder = paths.student("s")
    card = json.loads((folder / "distill.json").read_text())
    assert (card["guidance_range"], card["guidance_scale"]) == ([1.5, 5.0], 3.25)
    assert guidance_of(load_student(folder, CPU, CheckpointTeacher(**teacher)).conditioning) == RANGE
    where = f"{{path: {tmp_path / 'teacher'}, size: [16, 16]}}"
    given = ["--prompt", PROMPTS[0], "--teacher", where, "--out", "a.safetensors", "--steps", "2"]
    out = {}
    for scale in (None, 3.25, 5.0):
        done = command(capfd, "sample", str(folder), *given, *([] if scale is None else ["--guidance", str(scale)]))
        assert done.code == 0, done.err
        out[scale] = load_file("a.safetensors")
    assert torch.equal(out[None]["samples"], out[3.25]["samples"])
    assert (out[5.0]["samples"] - out[3.25]["samples"]).abs().max() > 1e-3
    done = command(capfd, "export", str(folder), "--whole", "--teacher", where, "--out", "whole")
    assert done.code == 0, done.err
    pipeline = DiffusionPipeline.from_pretrained("whole", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "latent"}
    for scale in (None, 5.0):
        made = pipeline(PROMPTS[0], latents=out[scale]["latents"].clone(), **call, guidance=scale).images
        torch.testing.assert_close(made, out[scale]["samples"], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"guidance=7; this student knows 1\.5 to 5"):
        pipeline(PROMPTS[0], **call, guidance=7)
    other = {**stage, "recipe": "consistency/consistency", "options": {"guidance_scale": [*RANGE]}}
    with pytest.raises(InputError, match="beside the second time, and this recipe's students have none; give one"):
        run(tmp_path / "other", {"name": "run", "teacher": teacher, "data": data, "stages": {"student": other}})
