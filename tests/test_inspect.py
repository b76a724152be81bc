"""`distill inspect` and `distill teachers`: what is read from the files of a teacher, without its weights."""

import json
from pathlib import Path

import checkpoints
import pytest
import test_teacher_wan
import torch
from commands import command, snapshot
from diffusers import DDPMScheduler
from latent import edit, write, write_conditions
from safetensors.torch import load_file, save_file
from test_teacher_flux import embeddings, pipeline

from distill.spec.model import CheckpointTeacher
from distill.teachers import architectures, load_teacher, overview
from distill.teachers.convention import Convention

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    """FLUX.1 dev in miniature, its weights in bfloat16."""
    folder = write(tmp_path_factory.mktemp("teachers") / "flux", pipeline(guidance_embeds=True).to(torch.bfloat16))
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: flux-1-dev\n---\n")
    return folder


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> Path:
    """A U-Net with ten classes and a null class."""
    return checkpoints.write(tmp_path_factory.mktemp("teachers") / "unet", checkpoints.unet(11), DDPMScheduler())


def inspected(capfd, teacher: object, *options: str) -> dict:
    done = command(capfd, "inspect", str(teacher), *options, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_a_latent_pipeline(capfd, flux):
    found = inspected(capfd, flux, "--size", "16,24")
    parameters = found["parameters"]
    assert parameters == sum(each.numel() for each in load_file(flux / WEIGHTS).values())
    assert found["networks"] == [{"folder": "transformer", "parameters": parameters, "dtypes": {"BF16": 66}}]
    assert (found["network"], found["pipeline"]) == ("FluxTransformer2DModel", "FluxPipeline")
    assert (found["shape"], found["size"], found["license"]) == ([4, 8, 12], [16, 24], "flux-1-dev")
    assert found["autoencoder"] == {"name": "AutoencoderKL", "factors": [1, 2]}
    assert (found["prediction"], found["t_range"]) == ("velocity", [0, 1])
    options = {"time_scale": 1000, "inverted": False}
    assert found["schedule"] == {
        "family": "linear", "scheduler": "FlowMatchEulerDiscreteScheduler", "options": options,
    }  # fmt: skip
    assert found["conditions"] == {"encoder_hidden_states": [None, 32], "pooled_projections": [24]}
    assert found["guidance"] == {"words": "embedded scale 3.5", "scale": 1, "embedded": 3.5, "has_null": None}
    assert list(found["to_set"]) == ["conditions"]
    bytes_of = {"weights in float32": 4, "weights in bfloat16": 2, "training of a copy": 20}
    assert found["memory"] == {what: count * parameters for what, count in bytes_of.items()}


def test_what_the_spec_sets_is_no_longer_to_set(capfd, flux, unet, tmp_path):
    path = write_conditions(tmp_path / "c.safetensors", embeddings(2), {k: v[:1] for k, v in embeddings(3).items()})
    found = inspected(capfd, f"{{path: {flux}, conditions: {path}, embedded_guidance: 2}}")
    assert found["to_set"] == {}
    assert (found["guidance"]["embedded"], found["guidance"]["has_null"]) == (2, True)
    found = inspected(capfd, unet)
    assert found["classes"] == 11
    assert found["to_set"]["null_class"].endswith("; valid: the last of its 11 embeddings, 10")
    found = inspected(capfd, f"{{path: {unet}, null_class: 10}}")
    assert (found["classes"], found["guidance"]["has_null"], found["to_set"]) == (10, True, {})


def test_the_facts_are_those_of_the_loaded_teacher(capfd, unet):
    teacher = load_teacher(CheckpointTeacher(path=str(unet)), checkpoints.CPU)
    found = inspected(capfd, unet)
    assert (tuple(found["shape"]), found["classes"]) == (teacher.shape, teacher.num_classes)
    assert found["parameters"] == sum(each.numel() for each in teacher.network.parameters())
    assert found["t_range"] == pytest.approx([0.009902, 0.993687], abs=1e-6)  # sigma/alpha of 0.01 and 157.4
    assert found["schedule"]["options"] == {"steps": 1000, "zero_snr": False}


def test_two_networks_and_a_video(capfd, tmp_path):
    network = test_teacher_wan.network
    stock = test_teacher_wan.pipeline(transformer_2=network(1), boundary_ratio=0.875)
    found = inspected(capfd, write(tmp_path / "wan", stock), "--size", "5,16,32")
    assert [each["folder"] for each in found["networks"]] == ["transformer", "transformer_2"]
    assert found["parameters"] == 2 * sum(each.numel() for each in network().parameters())
    assert (found["shape"], found["size"]) == ([4, 2, 2, 4], [5, 16, 32])
    assert found["guidance"]["words"] == "second call, scale 5"


def test_it_is_shown_as_a_table(capfd, flux, unet):
    shown = " ".join(command(capfd, "inspect", str(flux)).out.split())
    assert "weights in transformer 78,288 parameters; stored: BF16 (66 tensors)" in shown
    assert "schedule linear (FlowMatchEulerDiscreteScheduler): time_scale 1000, inverted no" in shown
    assert "size in pixels 256 x 256 (teacher.size sets another)" in shown
    assert "conditions encoder_hidden_states [any, 32], pooled_projections [24]" in shown
    assert shown.endswith(
        "to set in the spec: teacher.conditions: a file with embeddings of prompts; make it with: distill encode "
        "TEACHER PROMPTS.txt --out FILE; or leave it out, and begin the stages with cache: {kind: cache}"
    )
    assert "conditions class labels: 11 classes" in " ".join(command(capfd, "inspect", str(unet)).out.split())


def test_no_weight_is_read_and_nothing_is_written(capfd, unet, tmp_path):
    """Weights that are not finite are an error when a teacher is loaded."""
    folder, name = tmp_path / "unet", "diffusion_pytorch_model.safetensors"
    checkpoints.write(folder, checkpoints.unet(11), DDPMScheduler())
    weights = load_file(folder / "unet" / name)
    save_file({key: torch.full_like(each, torch.nan) for key, each in weights.items()}, folder / "unet" / name)
    checkpoints.refused(folder, "contains NaN or infinity")
    before = snapshot(tmp_path)
    assert inspected(capfd, folder) == inspected(capfd, unet) | {"path": str(folder)}
    assert snapshot(tmp_path) == before


def test_weights_that_do_not_fit_their_config_are_an_error(capfd, tmp_path):
    folder = checkpoints.write(tmp_path / "unet", checkpoints.unet(), DDPMScheduler())
    edit(folder / "unet" / "config.json", layers_per_block=2)
    done = command(capfd, "inspect", str(folder))
    assert done.code == 2
    assert done.err.startswith(f"error: {folder}/unet: config.json and the weights do not match: missing weights: ")


def test_a_scheduler_that_is_not_supported_is_to_set(capfd, tmp_path):
    folder = checkpoints.write(tmp_path / "unet", checkpoints.unet(), DDPMScheduler())
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="MyScheduler")
    found = inspected(capfd, folder)
    assert (found["schedule"], found["t_range"], found["prediction"]) == (None, None, "")
    assert "scheduler class MyScheduler is not supported" in found["to_set"]["scheduler"]
    assert "schedule not known" in " ".join(command(capfd, "inspect", str(folder)).out.split())
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert "has no scheduler config" in inspected(capfd, folder)["to_set"]["scheduler"]
    assert inspected(capfd, f"{{path: {folder}, prediction: velocity}}")["to_set"] == {}


def test_what_is_not_supported_is_said_with_what_is(capfd, flux, tmp_path):
    (tmp_path / "other").mkdir()
    for path in flux.iterdir():
        (tmp_path / "other" / path.name).symlink_to(path)
    (tmp_path / "other" / "model_index.json").unlink()
    index = json.loads((flux / "model_index.json").read_text())
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxFillPipeline"}))
    done = command(capfd, "inspect", str(tmp_path / "other"))
    assert (done.code, done.err) == (
        2,
        f"error: teacher.path={tmp_path}/other is a FluxFillPipeline, which is not supported, because it calls its "
        "FluxTransformer2DModel in another way; valid: FluxPipeline\n",
    )
    done = command(capfd, "inspect", "{kind: gaussian, mean: [0], std: [1]}")
    assert (done.code, done.err) == (
        2, "error: a gaussian teacher is known in closed form and has no files; give a checkpoint's folder\n",
    )  # fmt: skip
    done = command(capfd, "inspect", str(flux), "--size", "512")
    assert done.err == "error: --size 512: give height,width or frames,height,width, from 1 to 16,384\n"


# --- the table ---


def test_every_convention_says_what_it_is():
    found = [each for each in architectures.known().values() if isinstance(each, Convention)]
    assert found
    for each in found:
        where = type(each).__name__
        assert each.title and each.networks and each.prediction and each.conditions, where
        assert each.pipelines, where


def test_the_table_names_every_network_that_can_be_a_teacher(capfd, monkeypatch):
    rows = overview.supported()
    named = [name for row in rows for name in row.networks]
    students = {
        "FlowMapUNet2DModel",
        "AccelerationUNet2DModel",
        "FlowMapMLP",
        "AccelerationMLP",
        "FlowMapEdmUNet2DModel",
        "PolicyUNet2DModel",
        "PolicyMLP",
    }
    assert sorted(named) == sorted(architectures.known().keys() - students)
    assert rows[0].networks == ["UNet2DModel", "VelocityUNet2DModel"]
    assert len(json.loads(command(capfd, "teachers", "--json").out)) == len(rows)
    monkeypatch.setenv("COLUMNS", "200")
    shown = " ".join(command(capfd, "teachers").out.split())
    assert "FLUX.1 dev, schnell FluxTransformer2DModel FluxPipeline velocity text embedded scale 3.5" in shown
