"""LoRA files for ComfyUI: the names and rows are those of its networks, by diffusers' own converters from them.

A converter of checkpoints turns all weights of a network of ComfyUI into those of diffusers; one of LoRA files turns
the matrices of its layers. Both must give the change of the weights that was written. Layers have their real numbers of
rows and one input, since converters divide rows only.
"""

import math
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.utils import convert_unet_state_dict_to_peft
from latent import normal
from safetensors.torch import load_file, save_file

from distill.core.errors import InputError
from distill.networks.experts import Experts
from distill.students.comfy_keys import key_list, matches
from distill.students.lora_comfy import layers_of, read_comfy, tensors_of, why_not, why_not_in_diffusers, write_comfy
from distill.students.lora_weights import LoraLayer, LoraWeights, rows_of
from distill.teachers.architectures import known
from distill.teachers.convention import Convention

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers about itself
CONFIGS = {
    "AuraFlowTransformer2DModel": {"num_mmdit_layers": 1, "num_single_dit_layers": 2},
    "ChromaTransformer2DModel": {"num_layers": 1, "num_single_layers": 2},
    "Flux2Transformer2DModel": {"num_layers": 1, "num_single_layers": 2},
    "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True},
    "HunyuanDiT2DModel": {
        "num_layers": 4, "attention_head_dim": 88, "num_attention_heads": 16, "in_channels": 4, "sample_size": 32,
        "patch_size": 2, "hidden_size": 1408, "activation_fn": "gelu-approximate",
    },
    "LTXVideoTransformer3DModel": {"num_layers": 1},
    "Lumina2Transformer2DModel": {"num_layers": 1},
    "PixArtTransformer2DModel": {"num_layers": 1, "caption_channels": 64, "use_additional_conditions": True},
    "QwenImageTransformer2DModel": {"num_layers": 1},
    "SD3Transformer2DModel": {"num_layers": 3, "dual_attention_layers": (0,)},
    "UNet2DConditionModel": {
        "addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 2816,
        "addition_time_embed_dim": 256, "layers_per_block": 1, "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "WanTransformer3DModel": {"num_layers": 2, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "ZImageTransformer2DModel": {"n_layers": 1},
}  # fmt: skip
WITHOUT = {"CogView4Transformer2DModel", "DiTTransformer2DModel", "SanaTransformer2DModel"}  # ComfyUI has none of these
CHECKPOINTS = {
    "AuraFlowTransformer2DModel": "auraflow_transformer_checkpoint_to_diffusers",
    "ChromaTransformer2DModel": "chroma_transformer_checkpoint_to_diffusers",
    "Flux2Transformer2DModel": "flux2_transformer_checkpoint_to_diffusers",
    "FluxTransformer2DModel": "flux_transformer_checkpoint_to_diffusers",
    "LTXVideoTransformer3DModel": "ltx_transformer_checkpoint_to_diffusers",
    "Lumina2Transformer2DModel": "lumina2_to_diffusers",
    "SD3Transformer2DModel": "sd3_transformer_checkpoint_to_diffusers",
    "WanTransformer3DModel": "wan_transformer_to_diffusers",
}
READ = sorted(name for name in CONFIGS if key_list(name).diffusers is not None)


def network(name):
    """Without weights."""
    with torch.device("meta"):
        return getattr(diffusers, name)(**CONFIGS[name])


def layers(rows, ranks=(2, 3), alphas=(1.0, 4.0)):
    """A LoRA of these layers with one input each."""
    return {
        name: LoraLayer(
            normal(ranks[i % len(ranks)], 1, seed=2 * i),
            normal(count, ranks[i % len(ranks)], seed=2 * i + 1),
            alphas[i % len(alphas)],
        )
        for i, (name, count) in enumerate(rows.items())
    }


def same_changes(found, expected):
    """Other layers than the expected ones do not change."""
    for name, change in found.items():
        reference = expected[name].change if name in expected else torch.zeros_like(change)
        assert change.shape == reference.shape and (change - reference).abs().max() < 1e-5, name
    assert expected.keys() <= found.keys()


class Checkpoint(dict):
    """All weights of a network of ComfyUI. What it lacks, like biases and norms, is zero."""

    def pop(self, name, default=None):
        if name in self:
            return super().pop(name)
        weight = self.rows.get(name.removesuffix("bias") + "weight", 2)
        return torch.zeros(weight)


def test_each_network_of_a_latent_space_has_names_or_is_not_in_comfyui():
    classes = {name for name, found in known().items() if isinstance(found, Convention)}
    assert classes == CONFIGS.keys() | WITHOUT
    assert {name for name in classes if key_list(name) is None} == WITHOUT
    weights = LoraWeights("DiTTransformer2DModel", "transformer", {})
    assert why_not(weights, torch.nn.Module()) == "ComfyUI has no network like DiTTransformer2DModel"


@pytest.mark.parametrize("name", CONFIGS)
def test_each_layer_has_one_place(name):
    rows, keys = rows_of(network(name)), key_list(name)
    native = keys.native(rows)
    placed = [part for parts in native.values() for part in parts]
    assert sorted(placed) == sorted(rows)
    assert all(len(parts) == 1 for theirs, parts in native.items() if matches(keys.swapped, theirs, native))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back(name):
    rows, keys = rows_of(network(name)), key_list(name)
    given = layers(rows)
    same_changes(
        {k: v.change for k, v in layers_of(Path("x"), tensors_of(given, keys, rows), keys, rows).items()}, given
    )
    few = {each: layer for i, (each, layer) in enumerate(given.items()) if i % 3 == 0}
    read = layers_of(Path("x"), tensors_of(few, keys, rows), keys, rows)
    same_changes({name: each.change for name, each in read.items()}, few)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_names_are_those_of_checkpoints(name):
    rows, keys = rows_of(network(name)), key_list(name)
    given = layers(rows)
    tensors = tensors_of(given, keys, rows)
    checkpoint = Checkpoint()
    for theirs in keys.native(rows):
        down, up = (tensors[f"diffusion_model.{theirs}.{each}.weight"] for each in keys.matrices)
        alpha = tensors.get(f"diffusion_model.{theirs}.alpha")
        checkpoint[f"{theirs}.weight"] = (1.0 if alpha is None else float(alpha) / len(down)) * up @ down
    checkpoint.rows = {each: len(weight) for each, weight in checkpoint.items()}
    found = getattr(single_file_utils, f"convert_{CHECKPOINTS[name]}")(checkpoint)
    assert not checkpoint, "each weight was read"
    same_changes({each: found[f"{each}.weight"] for each in given}, given)


def converted(name, tensors):
    """The changes of the weights by diffusers' converter of LoRA files, by layer."""
    pipeline = getattr(diffusers, known()[name].pipelines[0])
    options = {"unet_config": network(name).config, "return_alphas": True} if name.startswith("UNet") else {}
    given = {each: tensor.clone() for each, tensor in tensors.items()}  # it changes some in place
    read = pipeline.lora_state_dict(given, **options)
    found, alphas = read if isinstance(read, tuple) else (read, {})
    prefix = "unet." if name.startswith("UNet") else "transformer."
    assert all(each.startswith(prefix) for each in found)
    found = convert_unet_state_dict_to_peft({each.removeprefix(prefix): value for each, value in found.items()})
    alphas = convert_unet_state_dict_to_peft({each.removeprefix(prefix): value for each, value in alphas.items()})
    changes = {}
    for each, down in found.items():
        if ".lora_A." in each:
            layer = each.partition(".lora_A.")[0]
            alpha = alphas.get(f"{layer}.lora_A.weight.alpha", alphas.get(f"{layer}.alpha", len(down)))
            changes[layer] = alpha / len(down) * found[f"{layer}.lora_B.weight"] @ down
    assert len(found) == 2 * len(changes)
    return changes


@pytest.mark.parametrize("name", READ)
def test_diffusers_reads_what_it_can_read(name):
    rows, keys = rows_of(network(name)), key_list(name)
    native = keys.native(rows)
    unread = {
        part for theirs, parts in native.items() if matches(keys.diffusers.unread, theirs, native) for part in parts
    }
    given = {each: layer for each, layer in layers(rows).items() if each not in unread}
    assert why_not_in_diffusers(given, keys, rows) == ""
    same_changes(converted(name, tensors_of(given, keys, rows)), given)
    if not keys.diffusers.complete:  # the attentions alone
        few = {each: layer for each, layer in given.items() if each.endswith(("to_q", "to_v"))}
        same_changes(converted(name, tensors_of(few, keys, rows)), few)


@pytest.mark.parametrize("name", READ)
def test_diffusers_does_not_read_the_others(name):
    """Each of them is lost, or changes other rows, or is refused, so the list says so."""
    rows, keys = rows_of(network(name)), key_list(name)
    native = keys.native(rows)
    for theirs, parts in native.items():
        if not matches(keys.diffusers.unread, theirs, native):
            continue
        given = layers({part: rows[part] for part in parts})
        complete = layers({part: rows[part] for each, found in native.items() for part in found
                           if matches(keys.diffusers.complete, each, native)})  # fmt: skip
        given |= complete
        assert f"layer {theirs} of such a file" in why_not_in_diffusers(given, keys, rows)
        with pytest.raises((ValueError, AssertionError)):
            same_changes(converted(name, tensors_of(given, keys, rows)), given)


def test_names_and_rows_of_fused_layers():
    rows = {f"single_transformer_blocks.3.{each}": count for each, count in
            {"attn.to_q": 2, "attn.to_k": 2, "attn.to_v": 2, "proj_mlp": 4, "proj_out": 3}.items()}  # fmt: skip
    given = layers(rows, ranks=(2, 1), alphas=(2.0, 1.0))
    del given["single_transformer_blocks.3.attn.to_k"]
    found = tensors_of(given, key_list("FluxTransformer2DModel"), rows)
    first, second = "diffusion_model.single_blocks.3.linear1", "diffusion_model.single_blocks.3.linear2"
    ends = ("alpha", "lora_down.weight", "lora_up.weight")
    assert list(found) == [f"{name}.{end}" for name in (first, second) for end in ends]
    q, v, mlp = (given[f"single_transformer_blocks.3.{each}"] for each in ("attn.to_q", "attn.to_v", "proj_mlp"))
    assert torch.equal(found[f"{first}.lora_down.weight"], torch.cat([q.down, v.down, mlp.down]))
    up = torch.zeros(10, 5)
    up[:2, :2], up[4:6, 2:4], up[6:, 4:] = q.up, v.up, mlp.up
    assert torch.equal(found[f"{first}.lora_up.weight"], up)
    assert found[f"{first}.alpha"] == 5.0, "the same factor of all parts, without rounding"
    given["single_transformer_blocks.3.proj_mlp"] = LoraLayer(mlp.down, mlp.up, 3.0)
    found = tensors_of(given, key_list("FluxTransformer2DModel"), rows)
    up[6:, 4:] = 3 * mlp.up
    assert torch.equal(found[f"{first}.lora_up.weight"], up) and found[f"{first}.alpha"] == 5.0
    assert math.isclose(found[f"{second}.alpha"], given["single_transformer_blocks.3.proj_out"].alpha)


def test_files(tmp_path):
    model = network("SD3Transformer2DModel")
    rows = rows_of(model)
    given = LoraWeights("SD3Transformer2DModel", "transformer", layers(rows))
    (path,) = write_comfy(tmp_path, "style", given, model)
    assert path == tmp_path / "style.safetensors"
    found = read_comfy([path], model)
    assert (found.network, found.component) == ("SD3Transformer2DModel", "transformer")
    same_changes({name: layer.change for name, layer in found.layers.items()}, given.layers)
    before = path.read_bytes()
    write_comfy(tmp_path, "style", given, model)
    assert path.read_bytes() == before
    (path,) = write_comfy(tmp_path, "half", given, model, torch.bfloat16)
    kinds = {(name.rpartition(".")[2], each.dtype) for name, each in load_file(path).items()}
    assert kinds == {("weight", torch.bfloat16), ("alpha", torch.float32)}


def test_two_networks_have_two_files(tmp_path):
    """As ComfyUI has a loader for each."""
    model = network("WanTransformer3DModel")
    q = layers({"blocks.0.attn1.to_q": 5120, "blocks.0.attn1.to_k": 5120})
    given = LoraWeights("WanTransformer3DModel", "transformer", {
        "transformer.blocks.0.attn1.to_q": q["blocks.0.attn1.to_q"],
        "transformer_2.blocks.0.attn1.to_q": q["blocks.0.attn1.to_k"],
    })  # fmt: skip
    experts = Experts(model, network("WanTransformer3DModel"), 875.0)
    paths = write_comfy(tmp_path, "style", given, experts)
    assert [path.name for path in paths] == ["style_high_noise.safetensors", "style_low_noise.safetensors"]
    assert sorted(load_file(paths[1])) == [
        f"diffusion_model.blocks.0.self_attn.q.{end}" for end in ("alpha", "lora_A.weight", "lora_B.weight")
    ]
    found = read_comfy(paths, experts)
    assert found.layers.keys() == given.layers.keys()
    same_changes({name: layer.change for name, layer in found.layers.items()}, given.layers)


def test_a_layer_that_comfyui_lacks_is_named(tmp_path):
    model = network("UNet2DConditionModel")
    given = LoraWeights("UNet2DConditionModel", "unet", layers({"time_embedding.cond_proj": 320}))
    said = "the network of ComfyUI has no layer like time_embedding.cond_proj"
    assert why_not(given, model) == said
    with pytest.raises(InputError, match=f"no LoRA file for ComfyUI can be written: {said}"):
        write_comfy(tmp_path, "style", given, model)
    assert not list(tmp_path.iterdir())


def test_files_of_other_models_are_refused(tmp_path):
    model, path = network("WanTransformer3DModel"), tmp_path / "x.safetensors"
    name = "diffusion_model.blocks.0.self_attn.q"
    a, b = {f"{name}.lora_A.weight": torch.ones(2, 5120)}, {f"{name}.lora_B.weight": torch.ones(5120, 2)}
    for tensors, said in (
        ({**a, **b, f"{name}.alpha": torch.ones(2)}, f"{path}: {name}.alpha has shape [2]; valid: one number"),
        ({**a, **b, "x": torch.ones(1)}, f"{path} has the tensor x, which is of no layer of this network"),
        (a, f"{path} has no matrix B for blocks.0.self_attn.q; copy or download it again"),
        (
            {**a, f"{name}.lora_B.weight": torch.ones(7, 2)},
            f"{path}: the layer blocks.0.self_attn.q has 7 rows, but in this network it has 5120; give a LoRA of this",
        ),
    ):
        save_file(tensors, path)
        with pytest.raises(InputError) as raised:
            read_comfy([path], model)
        assert str(raised.value).startswith(said)
