"""Folders of teachers as users have them: variants, wrapped names, adapters, training folders, parts of pipelines, and
files with unexpected content. Each is read correctly, or refused with one message that names the file and the key.
"""

import json
import os
import shutil
from pathlib import Path
from time import process_time

import pytest
import torch
from checkpoints import edit, load, noise, refused, unet, write
from choices import few
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from distill.core.errors import InputError
from distill.networks.acceleration_mlp import AccelerationMLP
from distill.networks.flow_map_mlp import FlowMapMLP
from distill.networks.flow_map_unet import FlowMapUNet2DModel
from distill.networks.velocity_mlp import VelocityMLP
from distill.networks.velocity_unet import VelocityUNet2DModel
from distill.spec.model import CheckpointTeacher
from distill.students.init import StudentInit
from distill.teachers import by_id, checkpoint, read, variants
from distill.teachers import weights as network_weights
from distill.teachers.read import NetworkConfig

FILE, HALF = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A pipeline of one channel, 8x8."""
    return write(tmp_path_factory.mktemp("made") / "teacher", unet(), DDIMScheduler())


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(made, tmp_path / "teacher"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / FILE)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "unet" / FILE, {"format": "pt"})


def read_of(names: list[str], *, weights: bool = True, **fields) -> list[str]:
    """Those of a repository's files that are read."""
    return by_id.read_of(CheckpointTeacher(path="org/x", **fields), names, weights=weights)


def same_weights(folder: Path, expected: dict[str, torch.Tensor], **fields) -> None:
    loaded = load(folder, **fields).network.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in expected.items())


# --- variants ---


def test_a_variant_alone_is_read(folder, tmp_path):
    half = {name: tensor.half() for name, tensor in weights(folder).items()}
    (folder / "unet" / FILE).unlink()
    save_file(half, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", {"format": "pt"})
    same_weights(folder, half)
    shutil.rmtree(folder / "unet")
    unet().save_pretrained(folder / "unet", variant="bf16", max_shard_size="30KB")
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors.index.bf16.json").is_file()
    same_weights(folder, unet().state_dict())


def test_the_plain_weights_go_before_variants(folder):
    plain = weights(folder)
    shutil.copy(folder / "unet" / FILE, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    rewrite(folder, {name: 2 * tensor for name, tensor in plain.items()})
    same_weights(folder, {name: 2 * tensor for name, tensor in plain.items()})


def test_the_variant_of_the_spec_is_read(folder):
    plain = weights(folder)
    half = {name: tensor.half() for name, tensor in plain.items()}
    save_file(half, folder / "unet" / HALF, {"format": "pt"})
    unet().save_pretrained(folder / "unet", variant="ema", max_shard_size="30KB")
    same_weights(folder, plain)
    same_weights(folder, half, variant="fp16")
    same_weights(folder, plain, variant="ema")
    assert load(folder, variant="fp16").digest != load(folder).digest
    refused(
        folder,
        f"{folder / 'unet'} has no weights in the variant bf16; valid for teacher.variant: ema, fp16, null (the plain "
        "weights)",
        variant="bf16",
    )


def test_a_subfolder_is_the_teacher_of_its_path(folder, tmp_path):
    outer = tmp_path / "outer" / "a"
    outer.mkdir(parents=True)
    folder.rename(outer / "b")
    whole, inside = load(outer / "b"), load(tmp_path / "outer", subfolder="a/b")
    assert (whole.digest, "UNet2DModel from outer/a/b") == (inside.digest, inside.description)
    assert load(outer, subfolder="b/unet").digest == whole.digest
    refused(outer, f"teacher.path={outer} has no folder teacher.subfolder=c, but b; give one of its", subfolder="c")
    refused(tmp_path, f"teacher.path={tmp_path} with teacher.subfolder=outer has neither", subfolder="outer")
    with pytest.raises(ValidationError, match=r"must be a relative path without \. and \.\."):
        CheckpointTeacher(path="x", subfolder="../b")
    with pytest.raises(ValidationError, match="must be 1 to 64 letters, digits or _"):
        CheckpointTeacher(path="x", variant="fp-16")


def test_options_that_do_not_fit_the_path_are_refused(folder):
    file = folder / "unet" / FILE
    refused(folder, f"teacher.config=x has no effect: {folder} is a folder; remove teacher.config", config="x")
    refused(file, f"teacher.variant=fp16 has no effect: {file} is a file; remove", variant="fp16", config=str(folder))
    refused(file, "teacher.subfolder=a has no effect: ", subfolder="a", config=str(folder))
    refused(file, "teacher.revision=main has no effect: ", " is a file here, not a hub id", revision="main")
    refused(folder, "teacher.lora_scale=0.5 has no effect without teacher.lora; remove it", lora_scale=0.5)


def test_a_network_in_half_precision_is_that_of_diffusers(folder):
    x, n = noise(), torch.tensor([3, 500, 900])
    for name, dtype in {"bfloat16": torch.bfloat16, "float16": torch.float16}.items():
        network = load(folder, dtype=name).network
        stock = UNet2DModel.from_pretrained(folder / "unet", torch_dtype=dtype)
        assert {each.dtype for each in network.parameters()} == {dtype}
        with torch.no_grad():
            assert torch.equal(network(x.to(dtype), n).sample, stock(x.to(dtype), n).sample)
    rewrite(folder, {**weights(folder), "conv_in.bias": torch.full((8,), 1e5)})
    load(folder, dtype="bfloat16")
    refused(
        folder,
        "contains NaN or infinity in conv_in.bias; give valid weights, or set another teacher.dtype, as float16",
        dtype="float16",
    )


class Kept(VelocityMLP):
    """A network with a module that stays in float32."""

    _keep_in_fp32_modules = ("layers",)

    def __init__(self, dim: int, width: int = 16, depth: int = 2) -> None:
        super().__init__(dim=dim, width=width, depth=depth)


def test_modules_that_a_class_keeps_in_float32_are_kept(tmp_path):
    Kept(2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    loaded, _ = network_weights.network(tmp_path, config, Kept, [tmp_path / FILE], torch.bfloat16)
    stored = load_file(tmp_path / FILE)
    for name, tensor in loaded.state_dict().items():
        expected = torch.float32 if name.startswith("layers.") else torch.bfloat16
        assert tensor.dtype == expected, name
        assert torch.equal(tensor, stored[name].to(expected))


def test_of_several_variants_one_is_chosen_or_asked_for():
    stem = "diffusion_pytorch_model"
    shards = [f"{stem}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    sharded = [*shards, f"{stem}.safetensors.index.fp16.json"]
    bf16 = f"{stem}.bf16.safetensors"
    assert variants.one_of([bf16, *sharded, "config.json"], "X") == sorted(sharded)
    assert variants.one_of([bf16, f"{stem}.non_ema.safetensors"], "X") == [bf16]
    assert variants.one_of([f"{stem}.non_ema.safetensors"], "X") == [f"{stem}.non_ema.safetensors"]
    assert variants.one_of([f"{stem}.bin", "other.safetensors"], "X") == []
    with pytest.raises(
        InputError, match="X has weights in the variants ema, non_ema, and none of them is chosen automatically; set"
    ):
        variants.one_of([f"{stem}.ema.safetensors", f"{stem}.non_ema.safetensors"], "X")


def test_of_a_repository_one_variant_of_networks_and_autoencoder_is_read_and_nothing_of_other_parts():
    configs = [
        "README.md", "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json",
        "transformer_2/config.json", "unet/config.json", "vae/config.json",
    ]  # fmt: skip
    parts = ("transformer", "transformer_2", "unet", "vae")
    plain, half = ([f"{part}/{name}" for part in parts] for name in (FILE, HALF))
    others = ["samples.json", "text_encoder/model.safetensors", "text_encoder/config.json", "unet/flax_model.msgpack"]
    assert read_of([*configs, *plain, *half, *others]) == sorted([*configs, *plain])
    assert read_of([*configs, *half, *others]) == sorted([*configs, *half])
    assert read_of([*configs, *plain, *half, *others], variant="fp16") == sorted([*configs, *half])
    assert read_of([*configs, *half], weights=False) == sorted(configs)
    assert read_of(["config.json", FILE]) == ["config.json", FILE]
    # The autoencoder may lack the variant; a network may not.
    assert f"vae/{FILE}" in read_of([*configs, *half[:3], plain[3]], variant="fp16")
    with pytest.raises(InputError) as error:
        read_of([*configs, *half[:2], *plain], variant="fp16")
    assert str(error.value) == (
        "teacher.path=org/x, in unet, has no weights in the variant fp16; valid for teacher.variant: null (the plain "
        "weights)"
    )


def test_of_a_subfolder_of_a_repository_its_pipeline_is_read_too():
    pipeline = ["model_index.json", "scheduler/scheduler_config.json", "vae/config.json", f"vae/{FILE}"]
    network = ["transformer/config.json", f"transformer/{FILE}"]
    ema = ["unet_ema/config.json", f"unet_ema/{FILE}"]
    names = [*pipeline, *network, *ema]
    inside = [f"a/b/{name}" for name in names]
    assert read_of(names, subfolder="transformer") == sorted([*pipeline, *network])
    # The configs of the pipeline's other networks are small, and read too.
    assert read_of(names, subfolder="unet_ema") == sorted([*pipeline, *ema, "transformer/config.json"])
    assert read_of([*inside, "config.json", FILE], subfolder="a/b") == sorted(f"a/b/{n}" for n in [*pipeline, *network])
    assert read_of(inside, subfolder="a/b/unet_ema", weights=False) == sorted(
        f"a/b/{name}" for name in [*pipeline[:3], ema[0], network[0]]
    )
    second = ["transformer_2/config.json", f"transformer_2/{FILE}"]
    assert read_of([*names, *second], subfolder="transformer") == sorted([*pipeline, *network, *second])


# --- names of weights ---


@pytest.mark.parametrize("wrapped", ["_orig_mod.{}", "module.{}", "module._orig_mod.{}"])
def test_what_training_puts_around_names_is_taken_off(folder, wrapped):
    plain = weights(folder)
    rewrite(folder, {wrapped.format(name): tensor for name, tensor in plain.items()})
    same_weights(folder, plain)


def test_a_block_that_was_compiled_alone_is_read(folder):
    plain = weights(folder)
    rewrite(folder, {name.replace("mid_block.", "mid_block._orig_mod."): t for name, t in plain.items()})
    same_weights(folder, plain)


def test_an_adapter_is_named(folder):
    plain = weights(folder)
    name = next(name for name in plain if name.endswith("to_q.weight"))
    base, lora = name.replace("to_q.", "to_q.base_layer."), name.replace("to_q.", "to_q.lora_A.default.")
    rewrite(folder, {**{k: t for k, t in plain.items() if k != name}, base: plain[name], lora: torch.zeros(2, 16)})
    refused(
        folder, f"{folder / 'unet'}: the weights contain an adapter (LoRA), like ", "merge it into the weights first"
    )
    rewrite(folder, plain)
    beside = folder / "pytorch_lora_weights.safetensors"
    save_file({"unet.x": torch.zeros(1)}, beside)
    refused(folder, f"adapters like {beside} are not loaded by themselves; set teacher.lora", ", or move it away")
    refused(folder / "unet", f"adapters like {beside} are not loaded")
    rewrite(folder, {f"base_layer.{k}": t for k, t in plain.items()})
    beside.unlink()
    refused(folder, "the weights contain an adapter (LoRA), like base_layer.conv_")
    rewrite(folder, {f"base_model.model.{k}": t for k, t in plain.items()})
    refused(folder, "the weights contain an adapter (LoRA), like base_model.model.conv_")


@pytest.mark.parametrize("place", ["", "unet"])
@pytest.mark.parametrize(
    "name",
    ["pytorch_lora_weights.bin", "my_style_LoRA.safetensors", "adapter_model.bin", "lora.ckpt", "MyLoRA2.PT"],
)
def test_an_adapter_beside_the_weights_is_refused_whatever_its_name(folder, place, name):
    (folder / place / name).write_bytes(b"x")
    refused(
        folder, f"adapters like {folder / place / name} are not loaded by", ", merge it", ", or move it away to use"
    )
    inside = str(Path(place) / name)
    with pytest.raises(InputError, match=f"teacher.path=org/x: adapters like {inside} are not loaded by themselves; "):
        read_of(["model_index.json", f"unet/{FILE}", inside], weights=False)


def test_a_word_that_holds_lora_is_no_adapter():
    for name in ("exploration.pt", "colorado.safetensors", "EXPLORATION.bin", "flora_v2.ckpt"):
        assert variants.ADAPTER.fullmatch(name) is None, name


def test_what_only_speaks_of_adapters_is_let_through(folder):
    for name in ("lora.md", "lora_config.json"):
        (folder / name).write_text("{}")
    (folder / "loras.bin").mkdir()
    assert load(folder).shape == (1, 8, 8)


@pytest.mark.parametrize("wrapped", ["module.conv_in.bias", "conv_in._orig_mod.bias"])
def test_a_weight_that_is_there_twice_is_refused(folder, wrapped):
    rewrite(folder, {**weights(folder), wrapped: torch.ones(8)})
    path = folder / "unet" / FILE
    with pytest.raises(InputError) as error:
        load(folder)
    assert str(error.value).startswith(f"{path}: ")
    assert {"conv_in.bias", wrapped} <= set(str(error.value).replace(",", "").split())
    assert "are the same weight, conv_in.bias; keep only one of them" in str(error.value)


def test_an_old_name_beside_the_new_one_is_refused_across_shards(folder):
    plain = weights(folder)
    name = next(name for name in plain if name.endswith("to_q.weight"))
    old = name.replace("to_q", "query")
    (folder / "unet" / FILE).unlink()
    save_file(plain, folder / "unet" / "a.safetensors", {"format": "pt"})
    save_file({old: plain[name]}, folder / "unet" / "b.safetensors", {"format": "pt"})
    index = {"weight_map": {old: "b.safetensors", name: "a.safetensors"}}
    (folder / "unet" / f"{FILE}.index.json").write_text(json.dumps(index))
    refused(folder, f"{folder / 'unet' / 'b.safetensors'}: ", " of a.safetensors are the same weight, ")


# --- no weights that can be read ---


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], f"has no {FILE}, but config.json; copy or download the weights"),
        (["model.safetensors"], f"but config.json, model.safetensors; rename model.safetensors to {FILE} if it"),
        (
            ["unet.ckpt"],
            "If you trust unet.ckpt, convert it: distill convert {unet}/unet.ckpt NEW_FOLDER",
        ),
        (
            ["diffusion_pytorch_model.bin", "a.ckpt", "diffusion_pytorch_model.fp16.bin"],
            "distill convert {unet}/diffusion_pytorch_model.bin NEW_FOLDER",
        ),
        (
            ["diffusion_pytorch_model.bf16.bin", "diffusion_pytorch_model.fp16.bin"],
            "distill convert {unet}/diffusion_pytorch_model.fp16.bin NEW_FOLDER",
        ),
        (
            ["diffusion_pytorch_model-00001-of-00002.safetensors"],
            f"has diffusion_pytorch_model-00001-of-00002.safetensors but no {FILE}.index.json, which maps weights to",
        ),
        (
            ["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"],
            f"-00001-of-00002.safetensors but no {FILE}.index.fp16.json, which maps weights to files",
        ),
    ],
)
def test_where_no_weights_can_be_read_it_says_what_is_there(folder, names, said):
    (folder / "unet" / FILE).unlink()
    for name in names:
        (folder / "unet" / name).write_bytes(b"x")
    with pytest.raises(InputError) as error:
        load(folder)
    assert str(error.value).startswith(f"{folder / 'unet'} has ")
    assert said.replace("{unet}", str(folder / "unet")) in str(error.value)
    assert ("distill convert" in str(error.value)) == any(name.endswith((".bin", ".ckpt")) for name in names)


def test_a_repository_of_pickled_weights_says_how_to_convert_them():
    names = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.bin"]
    with pytest.raises(InputError) as error:
        read_of(names)
    assert str(error.value).endswith(
        "If you trust diffusion_pytorch_model.fp16.bin, download the repository and convert it: distill convert "
        "unet/diffusion_pytorch_model.fp16.bin NEW_FOLDER"
    )
    assert read_of([*names, f"unet/{FILE}"]) == ["model_index.json", "unet/config.json", f"unet/{FILE}"]


def test_weights_that_do_not_fit_are_named_and_few(folder, capfd):
    rewrite(folder, {f"\x1b[31mother{i}.{'x' * 200}": torch.zeros(1) for i in range(50)})
    with pytest.raises(InputError) as error:
        load(folder)
    assert "do not match: missing weights: conv_in.weight, conv_in.bias, " in str(error.value)
    assert "more" in str(error.value) and len(str(error.value)) < 600
    rewrite(folder, {**weights(folder), **unet().state_dict()})
    with pytest.raises(InputError) as error:
        load(folder)
    assert "unknown weights: \ufffd[31mother0.xxx" in str(error.value) and len(str(error.value)) < 600
    assert capfd.readouterr() == ("", ""), "something else was printed"


@pytest.mark.parametrize(
    ("dtype", "named"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2")]
)
def test_quantized_weights_are_refused_by_name(folder, dtype, named):
    rewrite(folder, {**weights(folder), "conv_in.bias": torch.zeros(8).to(dtype)})
    refused(folder, f"{folder / 'unet' / FILE}: conv_in.bias has dtype {named}, so the weights are quantized; valid:")


def test_double_weights_are_read_and_what_float32_cannot_hold_is_refused(folder):
    double = {name: tensor.double() for name, tensor in weights(folder).items()}
    rewrite(folder, double)
    same_weights(folder, double)
    rewrite(folder, {**double, "conv_in.bias": torch.full((8,), 1e300, dtype=torch.float64)})
    refused(folder, "contains NaN or infinity in conv_in.bias")


def test_a_loaded_network_keeps_nothing_of_its_file(folder):
    """Mapped weights would change, or end the process, with the file."""
    teacher = load(folder)
    file = folder / "unet" / FILE
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(bytes(1000))
    assert all(torch.equal(teacher.network.state_dict()[name], tensor) for name, tensor in unet().state_dict().items())


# --- folders ---


def latent(folder: Path) -> Path:
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    return folder


def test_the_network_of_a_latent_pipeline_is_no_pixel_teacher(folder, tmp_path, monkeypatch):
    latent(folder)
    said = (
        f"is part of {folder}, a pipeline with the components scheduler, unet, vae; valid for a "
        f"UNet2DModel: pixel-space pipelines with only scheduler and unet"
    )
    refused(folder / "unet", f"teacher.path={folder / 'unet'} {said}")
    refused(folder / "unet", said, scheduler=str(folder / "scheduler"))
    (tmp_path / "link").symlink_to(folder / "unet")
    refused(tmp_path / "link", said)
    monkeypatch.chdir(folder / "unet")
    refused(".", "a pipeline with the components scheduler, unet, vae")


def test_a_pipeline_with_code_of_its_own_is_refused(folder):
    edit(folder / "model_index.json", _class_name=["pipeline", "MyPipeline"])
    said = (
        f"the pipeline {folder} has code of its own (model_index.json: _class_name=['pipeline', 'MyPipeline']), which "
        "is not run, so it is not known how it calls its network. If it does so as a pipeline of diffusers, copy the "
        "folder without model_index.json, and give the network's folder in the copy as teacher.path"
    )
    for each in (folder, folder / "unet"):
        refused(each, f"teacher.path={each}: {said}")
    (folder / "model_index.json").unlink()
    load(folder / "unet")  # as the message says


def test_the_network_of_a_student_folder_is_that_student(tmp_path):
    folder = write(tmp_path, unet(4), FlowMatchEulerDiscreteScheduler())
    facts = {"kind": "velocity", "null_class": 3, "guidance_scale": 2.5, "license": "mit"}
    (folder / "distill.json").write_text(json.dumps(facts))
    whole, part = load(folder), load(folder / "unet")
    assert whole.digest == part.digest
    assert (part.null_class, part.num_classes, part.guidance_scale, part.license) == (3, 3, 2.5, "mit")


def test_a_training_folder_names_what_to_give(folder, tmp_path):
    checkpoint = tmp_path / "checkpoint-500"
    for name in ("unet", "unet_ema"):
        shutil.copytree(folder / "unet", checkpoint / name)
    ema = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 500, "power": 0.75}
    edit(checkpoint / "unet_ema" / "config.json", **ema, update_after_step=0, use_ema_warmup=True)
    refused(
        checkpoint,
        f"Give teacher.path={checkpoint / 'unet_ema'}, the averaged weights, or {checkpoint / 'unet'}, with the",
        "as teacher.scheduler",
    )
    teacher = load(checkpoint / "unet_ema", scheduler=str(folder / "scheduler"))
    student = StudentInit(teacher, None, teacher.shape, None, 0, teacher).velocity_field()
    assert not set(ema) & {*teacher.network.config, *student.network.config}
    assert teacher.digest != load(folder).digest


# --- what files hold ---


def test_every_option_of_every_network_is_checked():
    """A new option in a new diffusers version fails here: say in `NetworkConfig` what it may be."""
    import inspect

    classes = [UNet2DModel, VelocityUNet2DModel, FlowMapUNet2DModel, VelocityMLP, FlowMapMLP, AccelerationMLP]
    for each in classes:
        options = set(inspect.signature(each.__init__).parameters) - {"self", "args", "kwargs"}
        assert options <= set(NetworkConfig.model_fields), each


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("unet/config.json", {"sample_size": "big"}, "sample_size='big'; valid: a valid integer or a valid list"),
        ("unet/config.json", {"sample_size": 0}, "sample_size=0; valid: greater than or equal to 1"),
        ("unet/config.json", {"sample_size": [8, 8, 8]}, "sample_size=[8, 8, 8]; valid: a valid integer or "),
        ("unet/config.json", {"sample_size": [8, -8]}, "sample_size=[8, -8]; valid: "),
        ("unet/config.json", {"sample_size": 10**9}, "sample_size=1000000000; valid: less than or equal to 8192"),
        ("unet/config.json", {"sample_size": True}, "sample_size=True; valid: a valid integer"),
        ("unet/config.json", {"sample_size": 7}, "its network cannot be called with a sample of shape [1, 7, 7]: "),
        (
            "unet/config.json",
            {"in_channels": 4, "out_channels": 4},
            "in_channels=4, as in a latent space",
        ),
        ("unet/config.json", {"sample_size": 8191}, "with a sample of shape [1, 8191, 8191] (tried: [1, 65, 65]): "),
        ("unet/config.json", {"sample_size": [8, 8191]}, "with a sample of shape [1, 8, 8191] (tried: [1, 8, 65]): "),
        ("unet/config.json", {"in_channels": "one"}, "in_channels='one'; valid: a valid integer"),
        ("unet/config.json", {"block_out_channels": [10**9]}, "block_out_channels.0=1000000000; valid: less than"),
        ("unet/config.json", {"block_out_channels": [8, 60000]}, "the weights do not match: "),
        ("unet/config.json", {"layers_per_block": 10**7}, "layers_per_block=10000000; valid: less than or equal"),
        ("unet/config.json", {"num_class_embeds": 10**7}, "missing weights: class_embedding.weight"),
        ("unet/config.json", {"num_class_embeds": 10**12}, "num_class_embeds=1000000000000; valid: less than"),
        ("unet/config.json", {"down_block_types": ["NoBlock"]}, "no network can be built from "),
        ("unet/config.json", {"norm_num_groups": 7}, "no network can be built from "),
        ("unet/config.json", {"act_fn": "\x1b[2Jx"}, "no network can be built from "),
        ("unet/config.json", {"time_embedding_type": 3}, "time_embedding_type=3; valid: 'positional', 'fourier' or"),
        ("unet/config.json", {"_class_name": {"a": 1}}, "network class {'a': 1} is not supported; valid: "),
        (
            "unet/config.json",
            {"alphas_cumprod": [0.1, 0.5, 0.9]},
            "alphas_cumprod=[0.1, 0.5, 0.9]; valid: 2 numbers or more, decreasing from below",
        ),
        (
            "unet/config.json",
            {"alphas_cumprod": []},
            "alphas_cumprod=[]; valid: 2 numbers or more, decreasing from below",
        ),
        (
            "unet/config.json",
            {"alphas_cumprod": [0.5]},
            "alphas_cumprod=[0.5]; valid: 2 numbers or more, decreasing from below",
        ),
        (
            "unet/config.json",
            {"alphas_cumprod": [0.5, 0.5]},
            "alphas_cumprod=[0.5, 0.5]; valid: 2 numbers or more, decreasing from below",
        ),
        (
            "unet/config.json",
            {"alphas_cumprod": [1.0, 0.5]},
            "alphas_cumprod=[1.0, 0.5]; valid: 2 numbers or more, decreasing from below",
        ),
        (
            "unet/config.json",
            {"alphas_cumprod": [0.5, -0.5]},
            "alphas_cumprod=[0.5, -0.5]; valid: 2 numbers or more, decreasing from below",
        ),
        ("unet/config.json", {"sigma_min": 90.0}, "sigma_min=90; valid: less than sigma_max=80"),
        ("unet/config.json", {"sigma_max": 0.002}, "sigma_min=0.002; valid: less than sigma_max=0.002"),
        ("model_index.json", {"unet": []}, "unet=[]; valid: a library and a class"),
        ("model_index.json", {"scheduler": [1, 2]}, "scheduler=[1, 2]; valid: a library and a class"),
        ("distill.json", {"kind": ["velocity"]}, "kind=['velocity']; valid: a valid string"),
        ("distill.json", {"guidance_scale": float("nan")}, "guidance_scale=nan; valid: a finite number"),
        ("distill.json", {"null_class": "none"}, "null_class='none'; valid: a valid integer"),
    ],
)
def test_a_value_that_no_checkpoint_holds_is_refused_by_its_key(folder, file, changes, said):
    if file == "distill.json":
        (folder / file).write_text("{}")
    edit(folder / file, **changes)
    with pytest.raises(InputError) as error:
        load(folder)
    assert said in str(error.value)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_json_that_cannot_be_read_is_named(folder, file):
    path = folder / file
    for text, said in (
        (DEEP, "cannot be read as JSON (nested too deeply)"),
        ("{", "cannot be read as JSON (Expecting property name"),
        ("[1]", "does not contain a JSON object"),
        ('{"a": ' + "1" * 5000 + "}", "cannot be read as JSON (Exceeds the limit"),
    ):
        path.write_text(text)
        refused(folder, f"{path} {said}")
    path.write_bytes(b'{"a": "\xff"}')
    refused(folder, f"{path} cannot be read as JSON ('utf-8' codec")


def test_a_file_without_end_and_a_pipe_are_not_read(folder):
    config = folder / "unet" / "config.json"
    with config.open("r+b") as opened:
        opened.truncate(read.MAX_BYTES + 1)
    refused(folder, f"{config} has {read.MAX_BYTES + 1} bytes; valid: at most")
    config.unlink()
    os.mkfifo(config)
    refused(folder, f"{config} cannot be read: it is a FIFO, not a file")


# what is there in place of a file: (how to put it there, what is said)
IN_PLACE = {
    "FIFO": (os.mkfifo, "cannot be read: it is a FIFO, not a file"),
    "folder": (os.mkdir, "cannot be read: it is a folder, not a file"),
    "dangling link": (
        lambda path: path.symlink_to("../blobs/ab12"),
        "is a link to ../blobs/ab12, which does not exist; copy or download it again",
    ),
    "link to itself": (
        lambda path: path.symlink_to(path.name),
        "cannot be read: Too many levels of symbolic links; fix this, or give a readable copy",
    ),
}


@pytest.mark.parametrize("what", IN_PLACE)
@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "distill.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        f"unet/{FILE}",
        f"unet/{FILE}.index.json",
    ],
)
def test_what_is_no_file_is_refused_as_what_it_is(folder, file, what):
    put, said = IN_PLACE[what]
    (folder / file).unlink(missing_ok=True)
    if file.endswith("index.json") and file.startswith("unet"):
        (folder / "unet" / FILE).unlink()
    put(folder / file)
    with pytest.raises(InputError) as error:
        load(folder)
    assert f"{folder / file} {said}" in str(error.value)
    assert "convert" not in str(error.value)


def test_a_pipeline_without_its_network_says_what_is_missing(folder):
    shutil.rmtree(folder / "unet")
    refused(folder, f"{folder / 'unet' / 'config.json'} does not exist; copy or download it again")


@pytest.mark.process
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", f"unet/{FILE}", "unet"])
def test_what_may_not_be_read_says_so(folder, file):
    """Read in a process that is not root, whom no permission stops."""
    place = folder.parent
    (folder / file).chmod(0)
    place.chmod(0o755)
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        said = "nothing was refused"
        try:
            os.chdir(place)  # the folders around it may be closed to others
            if os.getuid() == 0:
                os.setuid(65534)
            load(Path("teacher"))
        except InputError as error:
            said = str(error)
        finally:
            os.write(send, said.encode())
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    (folder / file).chmod(0o755)
    assert said == f"teacher/{file} cannot be read: Permission denied; fix this, or give a readable copy"


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {}}, "weight_map={}; valid: "),
        ({"weight_map": ["a"]}, "weight_map=['a']; valid: a valid dictionary"),
        (
            {"weight_map": {"a": "../../other.safetensors"}},
            "weight_map.a='../../other.safetensors'; valid: the name of a .",
        ),
        ({"weight_map": {"a": "weights.png"}}, "weight_map.a='weights.png'; valid: the name of a .safetensors file in"),
        ({"weight_map": {"a": "gone.safetensors"}}, "names gone.safetensors, which do not exist"),
    ],
)
def test_an_index_of_shards_names_files_beside_it(folder, index, said):
    (folder / "unet" / FILE).unlink()
    path = folder / "unet" / f"{FILE}.index.json"
    path.write_text(json.dumps(index))
    refused(folder, f"{path}", said)


# --- a field that is not finite ---


@pytest.mark.parametrize(
    ("scheduler", "t"),
    [(DDIMScheduler(), "0"), (EDMEulerScheduler(), "0.001996"), (FlowMatchEulerDiscreteScheduler(), "0")],
)
def test_a_network_that_takes_the_logarithm_of_its_time_is_refused(tmp_path, scheduler, t):
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        time_embedding_type="fourier",
    )
    refused(
        write(tmp_path, network, scheduler),
        f"the velocity of UNet2DModel from {tmp_path.name} at t={t} contains NaN or infinity (its "
        f"time_embedding_type is fourier)",
        "use a network that works at all times from",
    )


def test_a_network_is_called_with_a_small_sample_of_its_kind(folder, capfd):
    """What takes 8192 x 8192 pixels is not called with so many, and keeps its shape."""
    edit(folder / "unet" / "config.json", sample_size=8192)
    began = process_time()
    assert load(folder).shape == (1, 8192, 8192)
    assert process_time() - began < 20
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", few(["", "Resnet"], ""))
def test_the_small_sample_is_refused_exactly_where_the_large_one_is(tmp_path, kind):
    down, up = (f"{kind}DownsampleBlock2D", f"{kind}UpsampleBlock2D") if kind else ("DownBlock2D", "UpBlock2D")
    network = narrow(3, down, up)
    network.save_pretrained(tmp_path)
    for side in range(65, 73):
        edit(tmp_path / "config.json", sample_size=[side, 64])
        if side % 4 == 0:
            assert load(tmp_path, prediction="velocity").shape == (1, side, 64)
            network(torch.zeros(1, 1, side, 64), 0)
        else:
            refused(tmp_path, f"cannot be called with a sample of shape [1, {side}, 64]", prediction="velocity")
            with pytest.raises(RuntimeError):
                network(torch.zeros(1, 1, side, 64), 0)


@pytest.mark.long
def test_a_network_of_many_levels_needs_a_large_sample_and_a_large_network_says_so(tmp_path, capfd, monkeypatch):
    narrow(9, "DownBlock2D", "UpBlock2D").save_pretrained(tmp_path)
    edit(tmp_path / "config.json", sample_size=1024)
    assert load(tmp_path, prediction="velocity").shape == (1, 1024, 1024)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(checkpoint, "LARGE", 1e6)  # as if it had more parameters
    load(tmp_path, prediction="velocity")
    said = f"teacher.path={tmp_path}: testing its network on a sample of shape [1, 512, 512]; this may take minutes\n"
    assert capfd.readouterr() == ("", said)


def narrow(levels: int, down: str, up: str) -> UNet2DModel:
    """A convolutional network of four channels."""
    return UNet2DModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=(4,) * levels,
        down_block_types=(down,) * levels,
        up_block_types=(up,) * levels,
        layers_per_block=1,
        norm_num_groups=2,
        add_attention=False,
    ).eval()


def test_loading_draws_no_random_numbers(folder):
    state = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_of_any_dtype_with_or_without_metadata_are_read(folder):
    plain = weights(folder)
    save_file({name: tensor.double() for name, tensor in plain.items()}, folder / "unet" / FILE)
    same_weights(folder, plain)
    rewrite(folder, {name: tensor.bfloat16() for name, tensor in plain.items()})
    same_weights(folder, {name: tensor.bfloat16() for name, tensor in plain.items()})
    network = load(folder).network
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in [*network.parameters(), *network.buffers()])


class Tabled(VelocityMLP):
    """A network with a table that is in no file, and a tensor that is no buffer."""

    def __init__(self, dim: int, width: int = 16, depth: int = 2) -> None:
        super().__init__(dim=dim, width=width, depth=depth)
        self.register_buffer("table", torch.linspace(0, 1, 5), persistent=False)
        self.scale = torch.full((3,), 2.5)


def test_a_network_computes_what_is_in_no_file(tmp_path):
    made = Tabled(2)
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    loaded, _ = network_weights.network(tmp_path, config, Tabled, [tmp_path / FILE])
    assert torch.equal(loaded.table, made.table) and torch.equal(loaded.scale, made.scale)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in made.state_dict().items())


def test_text_encoders_of_a_hub_id_are_read_if_a_cache_needs_them():
    pipeline = ["model_index.json", "transformer/config.json", f"transformer/{FILE}", "vae/config.json", f"vae/{FILE}"]
    encoder = ["config.json", "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "flax_model.msgpack"]
    files = [*pipeline, *(f"text_encoder_2/{name}" for name in encoder), "tokenizer/vocab.txt", "tokenizer/notes.pdf"]
    spec = CheckpointTeacher(path="org/x")
    assert by_id.read_of(spec, files) == sorted(pipeline)
    kept = ["text_encoder_2/config.json", "text_encoder_2/model.safetensors", "tokenizer/vocab.txt"]
    assert by_id.read_of(spec, files, encoders=True) == sorted([*pipeline, *kept])
    half = spec.model_copy(update={"variant": "fp16"})
    found = by_id.read_of(half, [*files, "transformer/diffusion_pytorch_model.fp16.safetensors"], encoders=True)
    assert "text_encoder_2/model.fp16.safetensors" in found and "text_encoder_2/model.safetensors" not in found
