"""LoRAs on teachers: the weights are W + scale alpha/rank B A, whatever the layout of the file."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import refused, unet
from checkpoints import write as write_pixels
from diffusers import DDIMScheduler, FluxPipeline
from latent import ddim, load, normal, write, write_conditions
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from test_teacher_flux import embeddings as flux_embeddings
from test_teacher_flux import pipeline as flux
from test_teacher_unet_condition import SD
from test_teacher_unet_condition import embeddings as sd_embeddings
from test_teacher_unet_condition import pipeline as sd

from distill.core.errors import InputError
from distill.teachers.architectures import convention_of
from distill.teachers.lora import AdapterSettings, read

Q, OUT = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"  # layers of FLUX


@pytest.fixture(scope="module")
def flux_teacher(tmp_path_factory) -> tuple[Path, dict[str, object]]:
    """A folder, and the fields of its spec."""
    root = tmp_path_factory.mktemp("flux")
    conditions = write_conditions(root / "conditions.safetensors", flux_embeddings(2))
    return write(root / "flux", flux(guidance_embeds=False)), {"conditions": conditions, "size": [16, 24]}


def plain(folder: Path, part: str = "transformer") -> dict[str, torch.Tensor]:
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def matrices(weight: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B for a layer."""
    return normal(rank, *weight.shape[1:], seed=seed), normal(weight.shape[0], rank, seed=seed + 1)


def differs_by(teacher, before: dict[str, torch.Tensor], changes: dict[str, torch.Tensor]) -> None:
    """Only the weights of these layers have changed, by these matrices."""
    found = teacher.network.state_dict()
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        if (change := changes.get(name.removesuffix(".weight"))) is None:
            assert torch.equal(found[name], tensor), name
        else:
            assert change.abs().max() > 0.1
            assert (found[name] - tensor - change).abs().max() < 1e-5, name


def test_the_weights_are_those_of_the_formula(flux_teacher, tmp_path):
    folder, fields = flux_teacher
    before, file = plain(folder), tmp_path / "style.safetensors"
    (a, b), (c, d) = matrices(before[f"{Q}.weight"], 4, 1), matrices(before[f"{OUT}.weight"], 2, 3)
    tensors = {
        f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b, f"{Q}.alpha": torch.tensor(8.0),
        f"{OUT}.lora_A.weight": c, f"{OUT}.lora_B.weight": d,
    }  # fmt: skip
    save_file({f"transformer.{name}": each for name, each in tensors.items()}, file)
    teacher = load(folder, lora=str(file), lora_scale=0.5, **fields)
    differs_by(teacher, before, {Q: 0.5 * 8 / 4 * b @ a, OUT: 0.5 * d @ c})
    assert not any(name.partition(".")[0] == "peft" for name in {type(m).__module__ for m in teacher.network.modules()})
    assert not any(each.requires_grad for each in teacher.network.parameters())
    assert teacher.description == "FluxTransformer2DModel from flux with the LoRA style.safetensors"
    others = [load(folder, **given, **fields) for given in ({}, {"lora": str(file)})]
    assert len({each.digest for each in (teacher, *others)}) == 3
    assert len({each.base_digest for each in (teacher, *others)}) == 3
    in_16 = load(folder, dtype="bfloat16", **{**fields, "size": [24, 24]})  # other options, but the same base
    assert in_16.digest != others[0].digest and in_16.base_digest == others[0].base_digest


def test_a_file_of_the_pipeline_gives_its_weights(flux_teacher, tmp_path):
    """Its alpha is in the header of the file."""
    folder, fields = flux_teacher
    trained = flux(guidance_embeds=False).transformer
    trained.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "proj_out"], init_lora_weights=False))
    layers = get_peft_model_state_dict(trained)
    metadata = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "proj_out"]}
    FluxPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
    stock = flux(guidance_embeds=False)
    stock.load_lora_weights(tmp_path)
    stock.fuse_lora(lora_scale=0.5)
    stock.unload_lora_weights()
    expected = stock.transformer.state_dict()
    found = load(folder, lora=str(tmp_path), lora_scale=0.5, **fields).network.state_dict()
    assert found.keys() == expected.keys()
    assert max((found[name] - each).abs().max() for name, each in expected.items()) < 1e-6
    assert (found[f"{Q}.weight"] - plain(folder)[f"{Q}.weight"]).abs().max() > 0.1


def test_in_bfloat16_weights_are_rounded_once(flux_teacher, tmp_path):
    folder, fields = flux_teacher
    before = plain(folder)
    a, b = matrices(before[f"{Q}.weight"], 4, 1)
    names = (f"transformer.{Q}.lora_A.weight", f"transformer.{Q}.lora_B.weight")
    save_file(dict(zip(names, (a, b), strict=True)), tmp_path / "x.safetensors")
    found = load(folder, lora=str(tmp_path), dtype="bfloat16", **fields).network.state_dict()
    assert {each.dtype for each in found.values()} == {torch.bfloat16}
    expected = before[f"{Q}.weight"].bfloat16() + (b @ a).bfloat16()
    assert (found[f"{Q}.weight"] - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_a_folder_of_peft_is_read_with_its_settings(flux_teacher, tmp_path):
    folder, fields = flux_teacher
    before = plain(folder)
    a, b = matrices(before[f"{Q}.weight"], 4, 1)
    names = [f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"]
    save_file(dict(zip(names, (a, b), strict=True)), tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": ["to_q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    teacher = load(folder, lora=str(tmp_path), **fields)
    differs_by(teacher, before, {Q: 2 / 4**0.5 * b @ a})
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "IA3"}))
    refused(folder, "is an adapter of type IA3; valid: LORA", lora=str(tmp_path), **fields)


def test_kohyas_names_and_parts_of_text_encoders(tmp_path, capfd):
    """In Stable Diffusion, convolutions have LoRAs too."""
    folder = write(tmp_path / "sd", sd(ddim(**SD)))
    before, file = plain(folder, "unet"), tmp_path / "kohya.safetensors"
    layers = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"]
    tensors, changes = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 8)}, {}
    for number, layer in enumerate(layers):
        weight = before[f"{layer}.weight"]
        down, up = matrices(weight, 2, number)
        up = up.reshape(*up.shape, *[1] * (weight.ndim - 2))
        name = "lora_unet_" + layer.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
        changes[layer] = (1 / 2 * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.zeros(8, 2)
    tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"] = torch.tensor(1.0)
    save_file(tensors, file)
    conditions = write_conditions(tmp_path / "conditions.safetensors", sd_embeddings(2, xl=False))
    capfd.readouterr()
    differs_by(load(folder, lora=str(file), conditions=conditions), before, changes)
    assert capfd.readouterr().err == (
        f"warning: {file} also changes text encoders, which is not part of the teacher; load it into the pipeline that "
        "makes the embeddings, too\n"
    )


def test_a_pattern_of_alphas_fits_the_layers_that_it_fits_in_peft():
    """After ^, it is the whole name of a layer; else the end of the names of several."""
    outer, inner = "proj_out", OUT
    for patterns, expected in (
        ({"^proj_out": 8.0}, {outer: 8.0, inner: 2.0}),
        ({"proj_out": 8.0}, {outer: 8.0, inner: 8.0}),
        ({f"^{OUT}": 8.0}, {outer: 2.0, inner: 8.0}),
        ({"^proj_out": 8.0, "proj_out": 4.0}, {outer: 8.0, inner: 4.0}),
        ({"oj_out": 8.0}, {outer: 2.0, inner: 2.0}),
    ):
        settings = AdapterSettings(lora_alpha=2.0, alpha_pattern=patterns)
        assert {name: settings.alpha(name, 4) for name in (outer, inner)} == expected
        assert {name: patterns.get(get_pattern_key(patterns, name), 2.0) for name in (outer, inner)} == expected


# --- what is refused ---


def test_what_is_no_lora_of_the_network_is_refused(flux_teacher, tmp_path):
    folder, fields = flux_teacher
    file = tmp_path / "x.safetensors"
    a, b = f"transformer.{Q}.lora_A.weight", f"transformer.{Q}.lora_B.weight"
    good = dict(zip((a, b), matrices(plain(folder)[f"{Q}.weight"], 4, 1), strict=True))
    not_of_it = f"teacher.lora={file} is not a LoRA of the FluxTransformer2DModel of this teacher: "
    for tensors, said in (
        ({"transformer.x.lora_A.weight": good[a]}, f"{not_of_it}unknown weights: x.lora_A.weight; give a LoRA"),
        ({**good, f"transformer.{Q}.weight": torch.zeros(1)}, f"{not_of_it}unknown weights: {Q}.weight; give"),
        (
            {**good, "transformer.norm_out.linear.diff": torch.zeros(1)},
            f"{not_of_it}unknown weights: norm_out.linear.diff",
        ),
        ({a: good[a]}, f"teacher.lora={file} has {Q}.lora_A.weight but no {Q}.lora_B.weight; copy or download it"),
        ({**good, a: torch.ones(4, 7)}, f"{file} does not fit the FluxTransformer2DModel of this teacher ("),
        ({**good, a: torch.full((4, 32), torch.inf)}, f"{file} contains NaN or infinity in {a}; give valid weights"),
        ({"text_encoder.x.lora_A.weight": good[a]}, f"{not_of_it}it has no weights for this network"),
        ({f"lora_unet_x.{end}": torch.zeros(1) for end in ("lora_down.weight", "lora_up.weight", "alpha")}, str(file)),
    ):
        save_file(tensors, file)
        refused(folder, said, lora=str(file), **fields)
    file.write_bytes(b"x")
    refused(folder, f"{file} is truncated or damaged", lora=str(file), **fields)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": torch.ones(2)}, f"{{file}}: {Q}.alpha has shape [2]; valid: one number"),
        ({"lora_A.weight": None, "lora_B.bias": torch.ones(32)}, f"{Q}.lora_B.bias but no {Q}.lora_A.weight; copy or"),
        ({"lora_B.weight": None, "alpha": torch.ones(1)}, f"{Q}.alpha but no {Q}.lora_B.weight; copy or download it"),
        (
            {"lora_A.weight": torch.ones(0, 32), "lora_B.weight": torch.ones(32, 0)},
            f"the matrices A and B of {Q} have shapes [0, 32] and [32, 0]; valid: [rank, in, ...] and [out, rank, ...] "
            "with a rank of 1 or more",
        ),
        ({"lora_A.weight": torch.ones(3, 32)}, f"the matrices A and B of {Q} have shapes [3, 32] and [32, 4]; valid: "),
        ({"lora_A.weight": torch.tensor(1.0)}, f"the matrices A and B of {Q} have shapes [] and [32, 4]; valid: "),
    ],
)
def test_matrices_that_do_not_belong_together_are_refused(tmp_path, change, said):
    network, file = flux(guidance_embeds=False).transformer, tmp_path / "x.safetensors"
    a, b = matrices(network.get_submodule(Q).weight, 4, 1)
    tensors = {"lora_A.weight": a, "lora_B.weight": b, **change}
    save_file({f"transformer.{Q}.{name}": each for name, each in tensors.items() if each is not None}, file)
    with pytest.raises(InputError) as error:
        read(network, convention_of(network), file)
    assert said.format(file=file) in str(error.value)


def test_a_rank_of_0_in_another_layout_is_refused(tmp_path):
    """diffusers divides by it while it converts."""
    network, file = flux(guidance_embeds=False).transformer, tmp_path / "x.safetensors"
    name = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {"lora_down.weight": torch.ones(0, 32), "lora_up.weight": torch.ones(32, 0), "alpha": torch.tensor(1.0)}
    save_file({f"{name}.{end}": each for end, each in tensors.items()}, file)
    with pytest.raises(
        InputError, match=r"is not a LoRA of a FluxTransformer2DModel, or is in an unknown layout \(Zero"
    ):
        read(network, convention_of(network), file)


def test_where_there_is_no_lora_it_says_so(flux_teacher, tmp_path):
    folder, fields = flux_teacher
    refused(folder, "teacher.lora=/nowhere does not exist here; download it", lora="/nowhere", **fields)
    refused(
        folder,
        f"teacher.lora={tmp_path} is a folder with 0 safetensors files (nothing); give",
        lora=str(tmp_path),
        **fields,
    )
    pickled = tmp_path / "x.bin"
    pickled.write_bytes(b"x")
    refused(folder, f"teacher.lora={pickled}: only safetensors files are loaded", lora=str(pickled), **fields)
    pixels = write_pixels(tmp_path / "pixels", unet(), DDIMScheduler())
    save_file({"x": torch.zeros(1)}, tmp_path / "y.safetensors")
    refused(
        pixels,
        "has no effect on a UNet2DModel, because diffusers cannot add a LoRA to it",
        lora=str(tmp_path / "y.safetensors"),
    )


def test_an_adapter_beside_the_weights_can_be_the_lora(flux_teacher, tmp_path):
    folder, fields = flux_teacher
    file = folder / "pytorch_lora_weights.safetensors"
    a, b = matrices(plain(folder)[f"{Q}.weight"], 4, 1)
    save_file({f"transformer.{Q}.lora_A.weight": a, f"transformer.{Q}.lora_B.weight": b}, file)
    refused(folder, f"adapters like {file} are not loaded by themselves; set teacher.lora", **fields)
    differs_by(load(folder, lora=str(folder), **fields), plain(folder), {Q: b @ a})
    file.unlink()
