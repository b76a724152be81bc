"""The files of a LoRA student of every network class are loaded again by stock pipelines, without this project."""

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path

import latent_runs
import pytest
import tiny
import torch
from latent import CPU, conditions, normal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from distill.core.errors import RunError
from distill.spec.model import CheckpointTeacher
from distill.students import native
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.lora_comfy import why_not, write_comfy
from distill.students.lora_verify import verify
from distill.students.lora_weights import (
    FILE,
    LoraLayer,
    LoraWeights,
    add_to,
    from_network,
    read_diffusers,
    write_diffusers,
)
from distill.teachers import load_teacher
from distill.teachers.network_field import InDtype

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]
WITHOUT = {"cogview4", "dit", "sana"}  # networks that ComfyUI does not have
READ = {"sd", "sdxl", "flux2", "flux2 klein", "ltx", "qwen", "wan", "wan 2.2", "z image"}  # by diffusers, of this size
NO_CONVERTER = "diffusers has no converter for such files"
ROWS = "diffusers reads the layer {} of such a file only if it has {} rows"
UNREAD = {
    "flux": ROWS.format("single_blocks.0.linear1", 21504),
    "chroma": ROWS.format("single_blocks.0.linear1", 21504),
    "lumina2": ROWS.format("noise_refiner.0.attention.qkv", 3840),
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")


def student(place, make="velocity_field", ends=ATTENTION, **options):
    """A student with adapters in these layers, of two ranks and two factors."""
    teacher = teacher_on_linear_path(load_teacher(CheckpointTeacher(**place), CPU))
    init = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher)
    found = getattr(init, make)().eval().requires_grad_(False)
    base = native.base_of(found.network)
    layers = {}
    for i, (name, module) in enumerate(base.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(ends):
            out, into, *sides = module.weight.shape
            rank, alpha = ((2, 3.0), (4, 1.0))[i % 7 == 0]
            down, up = normal(rank, into, *sides, seed=i), normal(out, rank, *[1] * len(sides), seed=i + 1)
            layers[name] = LoraLayer(0.2 * down, 0.2 * up, alpha)
    add_to(found.network, LoraWeights("", "", layers))
    return teacher, found


def written(folder, found, dtype=torch.float32):
    """The files as an export writes them."""
    folder.mkdir()
    weights, network = from_network(found.network), native.base_of(found.network)
    write_diffusers(folder, weights, dtype)
    if why_not(weights, network):
        return []
    (folder / "comfyui").mkdir()
    return write_comfy(folder / "comfyui", "style", weights, network, dtype)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    place = tiny.TINY["flux"].write(tmp_path_factory.mktemp("flux"))
    return place, *student(place)


@pytest.mark.parametrize("name", tiny.TINY)
def test_stock_pipelines_load_the_files(name, tmp_path):
    teacher, found = student(tiny.TINY[name].write(tmp_path / "teacher"))
    files = written(tmp_path / "student", found)
    assert bool(files) == (name not in WITHOUT)
    proof = verify(tmp_path / "student", found, teacher.shape, conditions(teacher, 1), comfyui=files)
    assert proof.layers == len(from_network(found.network).layers) > 1
    assert proof.difference <= 1e-5
    assert proof.comfyui == UNREAD.get(name, "" if name in READ or not files else NO_CONVERTER)
    if len(files) > 1:
        assert [path.name for path in files] == ["style_high_noise.safetensors", "style_low_noise.safetensors"]


def test_all_layers_and_16_bits(tmp_path):
    """Also those that have no attention, on a base in bfloat16, with matrices in bfloat16."""
    teacher, found = student(tiny.TINY["qwen"].write(tmp_path / "teacher", dtype="bfloat16"), ends=("",))
    found.network.to(torch.bfloat16)
    found.call = replace(native.call_of(found), call=InDtype(native.call_of(found).call, torch.bfloat16))
    for name, each in found.network.named_parameters():
        if ".lora_" in name:
            each.data = each.data.float()
    files = written(tmp_path / "student", found, torch.bfloat16)
    cond, folder = conditions(teacher, 1), tmp_path / "student"
    proof = verify(folder, found, teacher.shape, cond, comfyui=files, dtype=torch.bfloat16)
    assert proof.layers == 34 and proof.comfyui == "" and proof.difference < 0.02


def test_a_flow_map_and_the_folder_of_the_teacher(flux, tmp_path):
    """The second time is not part of the LoRA. With the weights of another base, the outputs are others."""
    place = flux[0]
    teacher, found = student(place, "flow_map")
    with torch.no_grad():
        for each in found.network.gap.parameters():
            each += 0.1
    trained = [name for name, each in found.named_parameters() if each.requires_grad]
    written(tmp_path / "student", found)
    cond, folder = conditions(teacher, 1), tmp_path / "student"
    assert verify(folder, found, teacher.shape, cond, base=Path(place["path"])).difference <= 1e-5
    assert [name for name, each in found.named_parameters() if each.requires_grad] == trained
    assert not torch.equal(*(found(normal(1, *teacher.shape), torch.ones(1), torch.ones(1) * s, cond) for s in (0, 1)))
    other = shutil.copytree(place["path"], tmp_path / "other")
    path = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.1 * each for name, each in load_file(path).items()}, path)
    with pytest.raises(RunError, match="the stock network computes other outputs than here, relative difference 0"):
        verify(folder, found, teacher.shape, cond, base=other)


def header(path):
    with safe_open(path, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("damage", ["a layer is lost", "a number", "alpha", "for ComfyUI"])
def test_what_is_not_the_student_is_no_success(flux, tmp_path, damage):
    _, teacher, found = flux
    folder, cond = tmp_path / "student", conditions(teacher, 1)
    files = written(folder, found)
    path = files[0] if damage == "for ComfyUI" else folder / FILE
    tensors, told = load_file(path), header(path)
    name = next(iter(tensors))
    layer = name.removeprefix("transformer.").partition(".lora_")[0]
    if damage == "a layer is lost":
        tensors = {each: value for each, value in tensors.items() if not each.startswith(f"transformer.{layer}.")}
        said = f"diffusers does not load the layer {layer}"
    elif damage == "alpha":
        told, said = {"format": "pt"}, "diffusers multiplies the layer transformer_blocks.0.attn.to_"
    elif damage == "a number":
        tensors[name][0, 0] += 1e-3
        said = f"diffusers loads other numbers of the layer {layer}"
    else:
        tensors = {each: 1.001 * value for each, value in tensors.items()}
        said = "export failed: the file for ComfyUI has another change of transformer_blocks.0.attn.to_"
    save_file(tensors, path, told)
    with pytest.raises(RunError, match=f"{re.escape(said)}.*; nothing was exported$"):
        verify(folder, found, teacher.shape, cond, comfyui=files)


def test_adapters_that_change_nothing_yet_are_no_failure(flux, tmp_path):
    _, teacher, found = flux
    found = copy.deepcopy(found)
    for name, each in found.named_parameters():
        if "lora_B" in name:
            each.data.zero_()
    files = written(tmp_path / "student", found)
    assert verify(tmp_path / "student", found, teacher.shape, conditions(teacher, 1), comfyui=files).layers == 7
    with pytest.raises(RunError, match="export failed: the student has no adapters; nothing was exported"):
        verify(
            tmp_path, StudentInit(teacher, None, teacher.shape, None, 0, teacher).velocity_field(), teacher.shape, {}
        )


def test_a_run_proves_its_files(tmp_path, capfd):
    """Also of a stage that goes on with the adapters of another one. The lines of a run say it."""
    place = tiny.TINY["flux2"].write(tmp_path / "teacher")
    fields = {"pairs": "pairs", "lora": {"student": {"rank": 2}}, "recipe": "reflow/reflow"}
    spec = latent_runs.content(place, {}, [], {
        "first": {**latent_runs.TRAIN, **fields},
        "second": {**latent_runs.TRAIN, **fields, "init": "first"},
    })  # fmt: skip
    paths = latent_runs.run(tmp_path, spec)
    said = "loading the LoRA files again, in a process that cannot import distill"
    assert capfd.readouterr().out.count(said) == 2
    for name in ("first", "second"):
        folder = paths.student(name)
        assert (folder / FILE).is_file()
        weights = read_diffusers(folder)
        assert [path.name for path in (folder / "comfyui").iterdir()] == [f"{name}.safetensors"]
        assert any(layer.up.any() for layer in weights.layers.values())
