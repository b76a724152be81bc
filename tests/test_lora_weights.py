"""The file of a LoRA: what is written is what is read, in diffusers too; files of others are checked."""

import json
import os

import pytest
import test_teacher_sana as sana
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from latent import normal, seeded
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill.core.errors import InputError
from distill.networks.adapters import adaptable, as_trained
from distill.networks.experts import Experts
from distill.protocols import Adapter
from distill.students.lora_weights import (
    FILE,
    FILE_2,
    LoraLayer,
    LoraWeights,
    add_to,
    from_network,
    read_diffusers,
    rows_of,
)
from distill.students.lora_weights import write_diffusers as write

Q, OUT = "blocks.0.attn1.to_q", "blocks.0.attn1.to_out.0"


def wan(seed=0):
    return seeded(
        lambda: WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
            ffn_dim=16, num_layers=1,
        ),
        seed,
    )  # fmt: skip


def pipeline(first, second=None):
    """A pipeline with these networks alone."""
    others = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    return WanPipeline(transformer=first, transformer_2=second, **others)


def layer(seed=1, rank=2, alpha=3.0, out=24, into=24):
    return LoraLayer(normal(rank, into, seed=seed), normal(out, rank, seed=seed + 1), alpha)


def weights(**layers):
    return LoraWeights("WanTransformer3DModel", "transformer", layers or {Q: layer(), OUT: layer(3, 4, 0.1)})


def equal(first, second):
    assert (first.network, first.component) == (second.network, second.component)
    assert first.layers.keys() == second.layers.keys()
    for name, one in first.layers.items():
        other = second.layers[name]
        assert one.alpha == other.alpha
        assert torch.equal(one.down, other.down) and torch.equal(one.up, other.up)


def test_a_file_gives_back_its_layers_and_has_the_same_bytes_each_time(tmp_path):
    given = weights()
    write(tmp_path, given)
    first = (tmp_path / FILE).read_bytes()
    equal(read_diffusers(tmp_path), given)
    equal(read_diffusers(tmp_path / FILE), given)
    for _ in range(4):
        write(tmp_path, given)
        assert (tmp_path / FILE).read_bytes() == first
    with safe_open(tmp_path / FILE, "pt") as opened:
        header = opened.metadata()
    assert list(header) and header["network"] == "WanTransformer3DModel"
    assert json.loads(header["lora_adapter_metadata"]) == {
        "transformer.r": 2, "transformer.lora_alpha": 3.0, "transformer.target_modules": [Q, OUT][::-1],
        "transformer.rank_pattern": {f"^{OUT}": 4}, "transformer.alpha_pattern": {f"^{OUT}": 0.1},
    }  # fmt: skip


def test_diffusers_computes_with_alpha_over_rank(tmp_path):
    """Its weights are those of the formula for each layer."""
    given, network = weights(), wan()
    write(tmp_path, given)
    before = {name: each.clone() for name, each in network.state_dict().items()}
    pipeline(network).load_lora_weights(tmp_path)
    equal(from_network(network), given)
    network.fuse_lora()
    network.unload_lora()
    for name, each in network.state_dict().items():
        change = given.layers.get(name.removesuffix(".weight"))
        if change is None:
            assert torch.equal(each, before[name])
        else:
            assert change.change.abs().max() > 0.1
            assert (each - before[name] - change.change).abs().max() < 1e-6


@pytest.mark.parametrize("trainable", [False, True])
def test_adapters_are_added_to_a_network_in_place(trainable):
    network, given = wan(), weights()
    network.requires_grad_(False)
    storage = {name: each.data_ptr() for name, each in network.named_parameters()}
    random = torch.get_rng_state()
    add_to(network, given, trainable=trainable)
    assert torch.equal(torch.get_rng_state(), random)
    equal(from_network(network), given)
    added = {name for name, each in network.named_parameters() if "lora_" in name}
    assert len(added) == 4
    assert {name for name, each in network.named_parameters() if each.requires_grad} == (added if trainable else set())
    now = {name.replace(".base_layer.", "."): each.data_ptr() for name, each in network.named_parameters()}
    assert {name: now[name] for name in storage} == storage
    x, linear = normal(5, 24), network.get_submodule(OUT)
    expected = linear.base_layer(x) + x @ given.layers[OUT].change.float().T
    assert (linear(x) - expected).abs().max() < 1e-5


def test_adapters_of_a_recipe_are_found():
    role = as_trained("student", Adapter(wan(), 2, 4.0, ("to_q",)), 0)
    found = from_network(role.module)
    assert (found.network, found.component) == ("WanTransformer3DModel", "transformer")
    assert sorted(found.layers) == ["blocks.0.attn1.to_q", "blocks.0.attn2.to_q"]
    assert {(each.rank, each.alpha) for each in found.layers.values()} == {(2, 4.0)}
    assert not any(each.up.any() for each in found.layers.values())
    assert from_network(wan()).layers == {}


def test_two_networks_have_two_files(tmp_path):
    """diffusers loads each into its network."""
    given = LoraWeights(
        "WanTransformer3DModel", "transformer", {f"transformer.{Q}": layer(), f"transformer_2.{Q}": layer(5, 3)}
    )
    write(tmp_path, given)
    equal(read_diffusers(tmp_path), given)
    experts = Experts(wan(1), wan(2), 875.0)
    add_to(experts, given)
    equal(from_network(experts), given)
    stock = pipeline(wan(), wan())
    stock.load_lora_weights(tmp_path)
    stock.load_lora_weights(tmp_path, weight_name=FILE_2, load_into_transformer_2=True)
    equal(from_network(Experts(stock.transformer, stock.transformer_2, 875.0)), given)


def test_convolutions_and_rank_stabilised_factors(tmp_path):
    conv = LoraLayer(normal(2, 3, 3, 3), normal(5, 2, 1, 1, seed=2), 4.0)
    write(tmp_path, LoraWeights("UNet2DConditionModel", "unet", {"conv_in": conv}))
    found = read_diffusers(tmp_path).layers["conv_in"]
    expected = torch.einsum("or,rihw->oihw", 2 * conv.up[..., 0, 0], conv.down)
    assert found.change.shape == (5, 3, 3, 3) and (found.change - expected).abs().max() < 1e-6
    tensors = load_file(tmp_path / FILE)
    header = {"unet.lora_alpha": 4, "unet.use_rslora": True}
    save_file(tensors, tmp_path / FILE, {"lora_adapter_metadata": json.dumps(header)})
    assert read_diffusers(tmp_path).layers["conv_in"].alpha == pytest.approx(4 * 2**0.5)
    save_file(tensors, tmp_path / FILE)
    assert read_diffusers(tmp_path).layers["conv_in"].alpha == 2.0, "no alpha: the factor is 1"


def test_a_layer_whose_name_ends_another_ones_has_a_factor_of_its_own(tmp_path):
    """As in FLUX, which has proj_out and single_transformer_blocks.0.proj_out."""
    given = {
        "proj_out": layer(1, 2, 1.0),
        "single_transformer_blocks.0.proj_out": layer(3, 4, 4.0),
        Q: layer(5, 4, 4.0),
    }
    write(tmp_path, weights(**given))
    equal(read_diffusers(tmp_path), weights(**given))


def test_a_convolution_with_groups_has_no_lora():
    network = sana.pipeline().transformer
    name = "transformer_blocks.0.ff.conv_depth"
    assert network.get_submodule(name).groups > 1
    possible = adaptable(network)
    assert name not in possible and "transformer_blocks.0.ff.conv_inverted" in possible
    assert rows_of(network) == {each: len(found.weight) for each, found in possible.items()}
    with pytest.raises(InputError, match=f"the LoRA changes the layer {name}, which a SanaTransformer2DModel does not"):
        add_to(network, LoraWeights("", "transformer", {name: layer()}))


def test_other_files_are_refused(tmp_path):
    file, a, b = tmp_path / FILE, f"transformer.{Q}.lora_A.weight", f"transformer.{Q}.lora_B.weight"
    good = {a: normal(2, 24), b: normal(24, 2)}
    for tensors, header, said in (
        ({"x.lora_A.weight": good[a]}, {}, f"{file} has the tensor x.lora_A.weight; valid in a LoRA of diffusers: "),
        ({**good, f"transformer.{Q}.alpha": torch.ones(1)}, {}, f"{file} has the tensor transformer.{Q}.alpha; valid"),
        ({a: good[a]}, {}, f"{file} has no matrix B for {Q}; copy or download it again"),
        ({**good, b: normal(24, 3)}, {}, f"{file}: the matrices of {Q} have shapes [2, 24] and [24, 3]; valid: "),
        ({**good, b: normal(24)}, {}, f"{file}: the matrices of {Q} have shapes [2, 24] and [24]; valid: "),
        ({**good, a: torch.full((2, 24), torch.nan)}, {}, f"{file} contains NaN or infinity in {a}; give valid"),
        ({**good, a: torch.ones(2, 24, dtype=torch.int8)}, {}, f"{file}: {a} has dtype torch.int8; valid: floating"),
        ({**good, "unet.x.lora_A.weight": torch.ones(1)}, {}, f"{file} has layers of 2 networks; valid: of one"),
        (good, {"transformer.lora_alpha": 0}, f"{file} gives {Q} the alpha 0.0; valid: a finite number"),
        (good, {"transformer.peft_type": "IA3"}, f"{file} is an adapter of type IA3; valid: LORA"),
        (good, {"transformer.lora_alpha": "x"}, f"{file}: lora_alpha='x'; valid: a valid number"),
    ):  # fmt: skip
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps(header)})
        with pytest.raises(InputError) as raised:
            read_diffusers(tmp_path)
        assert str(raised.value).startswith(said)
    file.write_bytes(b"x")
    with pytest.raises(InputError, match="is truncated or damaged"):
        read_diffusers(file)
    file.unlink()
    with pytest.raises(InputError, match="does not exist; copy or download it again"):
        read_diffusers(tmp_path)
    os.mkfifo(file)
    with pytest.raises(InputError, match="cannot be read: it is a FIFO, not a file"):
        read_diffusers(tmp_path)


def test_a_lora_of_another_network_is_refused():
    for given, said in (
        (weights(x=layer()), "the LoRA changes the layer x, which a WanTransformer3DModel does not have; give"),
        (weights(**{Q: layer(out=7)}), f"the LoRA changes weights of shape [7, 24] in the layer {Q}, which has"),
        (LoraWeights("", "transformer", {}), "the LoRA changes no layer; give another one"),
    ):  # fmt: skip
        with pytest.raises(InputError) as raised:
            add_to(wan(), given)
        assert str(raised.value).startswith(said)
