"""Single files as teachers: in the layouts of the original authors and of ComfyUI, and in that of diffusers."""

import re
from pathlib import Path

import pytest
import torch
from checkpoints import refused, unet
from checkpoints import write as write_pixels
from diffusers import DDIMScheduler, UNet2DConditionModel
from latent import ddim, load, write, write_conditions
from safetensors.torch import load_file, save_file
from test_teacher_flux import embeddings as flux_embeddings
from test_teacher_flux import pipeline as flux
from test_teacher_unet_condition import SD
from test_teacher_unet_condition import embeddings as sd_embeddings
from test_teacher_unet_condition import pipeline as sd
from test_teacher_z_image import embeddings as z_embeddings
from test_teacher_z_image import pipeline as z_image
from torch import nn

from distill import teachers

PREFIX = "model.diffusion_model."
# diffusers' names in the U-Net of `sd` -> those of the original authors
LDM = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
LDM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the U-Net of `sd` in the layout of the original authors, with parts of other networks."""
    found = {"first_stage_model.x": torch.zeros(3), "cond_stage_model.transformer.position_ids": torch.arange(3)}
    for name, tensor in network.state_dict().items():
        start = next(each for each in LDM if name.startswith(f"{each}."))
        rest = name.removeprefix(start)
        if ".resnets." in start:
            part = rest.split(".")[1]
            rest = rest.replace(part, LDM_RESNET[part])
        found[f"{PREFIX}{LDM[start]}{rest}"] = tensor
    return found


def original_z_image(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of Z-Image as in ComfyUI's files, in which q, k and v are one matrix."""
    found = dict(network.state_dict())
    for name in [name for name in found if name.endswith(".attention.to_q.weight")]:
        parts = [found.pop(name.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
        found[name.replace("to_q", "qkv")] = torch.cat(parts)
    renamed = {
        "all_final_layer.2-1.": "final_layer.",
        "all_x_embedder.2-1.": "x_embedder.",
        ".attention.to_out.0.": ".attention.out.",
        ".attention.norm_k.": ".attention.k_norm.",
        ".attention.norm_q.": ".attention.q_norm.",
    }
    for theirs, original in renamed.items():
        found = {name.replace(theirs, original): tensor for name, tensor in found.items()}
    return {PREFIX + name: tensor.bfloat16() for name, tensor in found.items()}


def same_network(teacher: teachers.LoadedTeacher, expected: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    found, expected = teacher.network.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> tuple[Path, Path, str]:
    """A pipeline folder without weights, a file in the original layout, and conditions."""
    root = tmp_path_factory.mktemp("sd")
    stock = sd(ddim(**SD))
    save_file(ldm(stock.unet), root / "sd.safetensors")
    write(root / "sd", stock)
    (root / "sd" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    path = write_conditions(root / "conditions.safetensors", sd_embeddings(2, xl=False))
    return root / "sd", root / "sd.safetensors", path


@pytest.mark.parametrize("inside", ["", "unet"])
def test_stable_diffusion_in_the_original_layout(stable_diffusion, inside):
    folder, file, conditions = stable_diffusion
    teacher = load(file, config=str(folder / inside), conditions=conditions)
    assert teacher.description == "UNet2DConditionModel from sd.safetensors"
    same_network(teacher, sd(ddim(**SD)).unet)
    stock = UNet2DConditionModel.from_single_file(
        str(file), config=str(folder), subfolder="unet", local_files_only=True
    )
    same_network(teacher, stock)


def test_z_image_as_in_comfyui_in_bfloat16(tmp_path):
    stock = z_image()
    save_file(original_z_image(stock.transformer), tmp_path / "z.safetensors")
    path = write_conditions(tmp_path / "conditions.safetensors", z_embeddings(2, 2))
    folder = str(write(tmp_path / "z", stock))
    for name, dtype in {"bfloat16": torch.bfloat16, "float32": torch.float32}.items():
        teacher = load(tmp_path / "z.safetensors", config=folder, conditions=path, size=[32, 64], dtype=name)
        same_network(teacher, stock.transformer.bfloat16(), dtype)


def test_a_file_with_the_names_of_diffusers(tmp_path):
    stock = flux(guidance_embeds=False)
    folder = write(tmp_path / "flux", stock)
    path = write_conditions(tmp_path / "conditions.safetensors", flux_embeddings(2))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "flux.safetensors")
    same_network(
        load(tmp_path / "flux.safetensors", config=str(folder), conditions=path, size=[16, 24]), stock.transformer
    )


# --- what is refused ---


def changed(file: Path, to: Path, change) -> Path:
    """A copy of a file with other tensors."""
    save_file(change(load_file(file)), to)
    return to


def test_what_cannot_be_read_says_what_to_give(stable_diffusion, tmp_path):
    folder, file, conditions = stable_diffusion
    given = {"config": str(folder), "conditions": conditions}
    refused(file, f"teacher.path={file} is a single file, ", "; set teacher.config to a folder of the same model in")
    refused(file, "teacher.config=/nowhere is not a folder here; give the folder", config="/nowhere")
    ckpt = tmp_path / "sd.ckpt"
    ckpt.write_bytes(b"pickled")
    refused(ckpt, f"teacher.path={ckpt} is a file; give the folder", "or a .safetensors file with teacher", **given)
    refused(
        write_pixels(tmp_path / "pixels", unet(), DDIMScheduler()) / "unet" / "diffusion_pytorch_model.safetensors",
        "a UNet2DModel cannot be read from a single file; save it with save_pretrained and give that folder",
        config=str(tmp_path / "pixels"),
    )
    other = tmp_path / "other.safetensors"
    bias = f"{PREFIX}out.2.bias"
    for change, said in (
        (lambda each: {"x": torch.zeros(1)}, f"{other} does not match config.json of teacher.config={folder}"),
        (lambda each: {k: v for k, v in each.items() if k != bias}, ": missing weights: conv_out.bias"),
        (lambda each: {**each, bias: torch.zeros(5)}, ": conv_out.bias has shape [5] in the file, but config.json"),
        (lambda each: {**each, bias: torch.full((4,), torch.nan)}, "contains NaN or infinity in conv_out.bias; give"),
        (
            lambda each: {**each, bias: each[bias].to(torch.float8_e4m3fn)},
            f"{other}: {bias} has dtype F8_E4M3, so the weights are quantized; valid: BF16, F16, F32, F64. Give",
        ),
    ):
        refused(changed(file, other, change), said, **given)
    other.write_bytes(b"not safetensors")
    refused(other, f"{other} is truncated or damaged (", **given)


def test_a_file_of_another_network_is_refused(stable_diffusion, tmp_path):
    """Its conversion fails, or there are weights that the network does not have."""
    folder, file, _ = stable_diffusion
    stock = z_image()
    path = write_conditions(tmp_path / "conditions.safetensors", z_embeddings(2, 2))
    given = {"config": str(write(tmp_path / "z", stock)), "conditions": path, "size": [32, 64]}
    refused(
        file, f"{file} does not match config.json of teacher.config={given['config']}", ": missing weights: ", **given
    )
    more = tmp_path / "more.safetensors"
    layer = {
        re.sub(r"layers\.1\.", "layers.2.", name): tensor
        for name, tensor in original_z_image(stock.transformer).items()
    }
    save_file(layer | original_z_image(stock.transformer), more)
    refused(more, ": unknown weights: layers.2.", **given)
    path = write_conditions(tmp_path / "flux.safetensors", flux_embeddings(2))
    given = {"config": str(write(tmp_path / "flux", flux(guidance_embeds=False))), "conditions": path}
    refused(
        file, f"teacher.path={file} is not a file of a FluxTransformer2DModel like the one of teacher.config", **given
    )
