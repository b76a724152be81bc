"""LoRAs merged into weights and taken out again, and extracted from the change of a student; weights in int8."""

import copy

import pytest
import torch
from latent import CPU, normal
from torch import nn

from distill.core.errors import InputError
from distill.students.extract import decompose, relative_change
from distill.students.lora_weights import LoraLayer, LoraWeights
from distill.students.merging import merge, unmerge
from distill.students.quantised import Int8Linear, called_layers, quantise


def network() -> nn.Module:
    """Layers of all kinds: linear ones, convolutions of images and videos, one with groups, a norm."""
    made = nn.ModuleDict(
        {
            "wide": nn.Linear(24, 10),
            "tall": nn.Linear(6, 20, bias=False),
            "image": nn.Conv2d(4, 12, 3),
            "video": nn.Conv3d(3, 8, (1, 2, 2)),
            "grouped": nn.Conv2d(8, 8, 3, groups=8),
            "norm": nn.LayerNorm(10),
        }
    )
    for i, parameter in enumerate(made.parameters()):
        parameter.data = normal(*parameter.shape, seed=i)
    return made.requires_grad_(False)


SHAPES = {name: each.weight.shape for name, each in network().items() if name not in ("grouped", "norm")}


def lora(rank: int, alpha: float, size: float = 0.1) -> LoraWeights:
    layers = {
        name: LoraLayer(
            size * normal(rank, *shape[1:], seed=20 + i),
            normal(shape[0], rank, *[1] * (len(shape) - 2), seed=40 + i),
            alpha,
        )
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return LoraWeights("Network", "transformer", layers)


def test_a_merged_layer_computes_as_with_the_lora_beside_it():
    plain, merged, weights = network(), network(), lora(3, 6.0)
    merge(merged, weights, 0.5)
    inputs = {"wide": normal(2, 24), "tall": normal(2, 6), "image": normal(2, 4, 5, 6), "video": normal(2, 3, 2, 5, 6)}
    for name, x in inputs.items():
        down, up = (copy.deepcopy(plain[name]) for _ in range(2))
        layer, bias = weights.layers[name], plain[name].bias
        down.weight, up.weight = (nn.Parameter(each, requires_grad=False) for each in (layer.down, layer.up))
        down.bias = up.bias = None
        if name in ("image", "video"):
            up.kernel_size = (1,) * (x.ndim - 2)
        expected = plain[name](x) + 0.5 * 6.0 / 3 * up(down(x))
        assert bias is None or torch.equal(bias, merged[name].bias)
        assert (merged[name](x) - expected).abs().max() <= 1e-5
        assert (merged[name](x) - plain[name](x)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_rounded_once(dtype):
    merged, weights = network().to(dtype), lora(3, 6.0)
    merge(merged, weights, -1.5)
    for name, layer in weights.layers.items():
        before = network()[name].weight.to(dtype).double()
        assert torch.equal(merged[name].weight, (before - 1.5 * layer.change).to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_merged_is_taken_out_again(dtype):
    """Up to half a unit in the last place of the merged weight; bit for bit if the original is at hand."""
    original, weights = network().to(dtype), lora(3, 6.0)
    merged = copy.deepcopy(original)
    merge(merged, weights, 0.7)
    back, exact = copy.deepcopy(merged), copy.deepcopy(merged)
    unmerge(back, weights, 0.7)
    unmerge(exact, weights, 0.7, original.state_dict())
    for name in SHAPES:
        rounding = torch.finfo(dtype).eps * (merged[name].weight.abs() + original[name].weight.abs())
        assert ((back[name].weight - original[name].weight).abs() <= rounding).all()
        assert torch.equal(exact[name].weight, original[name].weight)
    merged["wide"].weight[0, 0] += 1  # trained further: the original does not give these weights
    unmerge(merged, weights, 0.7, original.state_dict())
    assert (merged["wide"].weight - original["wide"].weight)[0, 0] > 0.9
    assert torch.equal(merged["tall"].weight, original["tall"].weight)


def test_a_lora_of_another_model_changes_nothing():
    given, before = network(), network().state_dict()
    layer = LoraLayer(normal(2, 24), normal(10, 2), 2.0)
    for name, each, message in (
        ("other", layer, "changes the layer other, which this ModuleDict does not have; give a LoRA"),
        ("grouped", layer, "changes the layer grouped, which this ModuleDict does not have"),
        ("tall", layer, r"of shape \[10, 24\] in the layer tall, which has shape \[20, 6\] in this ModuleDict"),
    ):
        with pytest.raises(InputError, match=message):
            merge(given, LoraWeights("Network", "unet", {"wide": layer, name: each}))
    with pytest.raises(InputError, match="the LoRA changes no layer"):
        unmerge(given, LoraWeights("Network", "unet", {}))
    assert all(torch.equal(each, before[name]) for name, each in given.state_dict().items())
    with pytest.raises(InputError, match="the weights of wide are not finite in torch.bfloat16; use a smaller --scale"):
        merge(network().bfloat16(), LoraWeights("Network", "unet", {"wide": layer}), 1e39)


def test_a_known_lora_is_recovered():
    base, weights = network(), lora(3, 6.0)
    student = copy.deepcopy(base)
    merge(student, weights)
    found = decompose(base, student, [3], CPU)
    assert found.layers.keys() == SHAPES.keys() and not found.others
    for name, layer in found.lora(3, "Network", "transformer").layers.items():
        assert layer.alpha == layer.rank == 3
        assert layer.up.shape == weights.layers[name].up.shape and layer.down.shape == weights.layers[name].down.shape
        assert (layer.change - weights.layers[name].change).abs().max() <= 1e-5
        assert found.layers[name].kept(3) == pytest.approx(1, abs=1e-6)
    again = copy.deepcopy(base)
    merge(again, found.lora(3, "Network", "transformer"))
    assert all((again[name].weight - student[name].weight).abs().max() <= 1e-5 for name in SHAPES)


def test_the_error_of_a_lower_rank_is_that_of_the_values_left_out():
    """Eckart and Young. Ranks above the sides of a layer are cut off there, where nothing is left out."""
    base = network()
    student = copy.deepcopy(base)
    for i, parameter in enumerate(student.parameters()):
        parameter += 0.1 * normal(*parameter.shape, seed=60 + i)
    found = decompose(base, student, [1, 4, 8], CPU)
    for rank in (1, 4, 8):
        kept = 0.0
        for name, layer in found.lora(rank, "", "unet").layers.items():
            change = (student[name].weight.double() - base[name].weight.double()).flatten(1)
            values = torch.linalg.svdvals(change)
            left_out = values[rank:].square().sum().item()
            assert layer.rank == min(rank, len(values))
            assert (change - layer.change.flatten(1)).square().sum().item() == pytest.approx(left_out, abs=1e-9)
            share = 1 - left_out / values.square().sum().item()
            assert found.layers[name].kept(rank) == pytest.approx(share, abs=1e-6)
            kept += share * values.square().sum().item()
        assert found.kept(rank) == pytest.approx(kept / found.energy, abs=1e-6)
    change = {name: (each - base.state_dict()[name]).double() for name, each in student.state_dict().items()}
    total = sum(each.square().sum().item() for each in change.values())
    assert found.energy == pytest.approx(total)
    before = sum(each.double().square().sum().item() for each in base.parameters())
    assert relative_change(base, student) == pytest.approx((total / before) ** 0.5)
    others = ["grouped.weight", "norm.weight", "wide.bias", "image.bias", "video.bias", "grouped.bias", "norm.bias"]
    assert found.shares.keys() == {*others} and [*found.shares.values()] == sorted(found.shares.values(), reverse=True)
    assert all(found.shares[name] == pytest.approx(change[name].square().sum().item() / total) for name in others)


def test_what_cannot_be_extracted_is_refused():
    base, student = network(), network()
    with pytest.raises(InputError, match=r"in all layers \(nothing has changed\); train it first"):
        decompose(base, student, [1], CPU)
    student["norm"].weight += 1
    with pytest.raises(InputError, match=r"in all layers \(only parameters that a LoRA cannot hold have changed\)"):
        decompose(base, student, [1], CPU)
    for rank in (0, 13):
        with pytest.raises(InputError, match=f"--rank {rank}: valid are 1 to 12, the smaller side of the largest"):
            decompose(base, student, [2, rank], CPU)
    student["new"] = nn.Linear(3, 3)
    with pytest.raises(InputError, match=r"of different sizes: new\.weight differs"):
        decompose(base, student, [1], CPU)
    nn.init.zeros_(student["new"].weight), nn.init.zeros_(student["new"].bias)  # without effect
    student["tall"].weight += 1
    assert decompose(base, student, [1], CPU).layers.keys() == {"tall"}
    student["wide"] = nn.Linear(25, 10)
    with pytest.raises(InputError, match=r"of different sizes: wide\.weight differs; give the ModuleDict that"):
        decompose(base, student, [1], CPU)


def test_rounded_weights_are_those_of_their_channel():
    layer = torch.nn.Linear(3, 2).bfloat16()
    layer.weight.data = torch.tensor([[127.5, 3.0, -2.0], [-25.5, 0.05, 0.25]]).bfloat16()
    layer.bias.data = torch.tensor([1.0, -1.0]).bfloat16()
    network = torch.nn.ModuleDict({"one": layer, "other": torch.nn.Linear(3, 2)})
    with called_layers(network) as layers:
        network["one"](torch.ones(1, 3).bfloat16())
    assert layers == {"one": layer}
    quantise(network, layers)
    found = network["one"]
    assert isinstance(found, Int8Linear) and isinstance(network["other"], torch.nn.Linear)
    assert found.weight.tolist() == [[127, 3, -2], [-127, 0, 1]]
    assert found.scale.tolist() == [1.0, pytest.approx(0.2, rel=2**-8)]
    x = torch.tensor([[1.0, 2.0, 3.0]]).bfloat16()
    expected = x.double() @ (found.weight.double() * found.scale.double()[:, None]).T + layer.bias.double()
    assert (found(x).double() - expected).abs().max() <= 2**-8 * expected.abs().max()
