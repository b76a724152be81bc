"""The optimizers that a spec can name: their steps, what they keep, resuming them, and what they refuse."""

import sys
from collections import OrderedDict

import pytest
import torch
from programs.train_vector import FlowMatching, KilledAt, KilledError, Vector, train
from test_engine import assert_same, bits, saved
from torch import nn

from distill.core.errors import InputError
from distill.protocols import Trained
from distill.runs.run_store import RunPaths, read_events
from distill.spec.model import OptimizerSpec, TrainStage, stage_content
from distill.training import optimizers
from distill.training.plain import PlainTrainable

WIDE = 96  # 96 x 96 weights are more than bitsandbytes keeps in float32


class Wide(FlowMatching):
    """A network with weights of which bitsandbytes quantises the moments."""

    def networks(self, init):
        network = Vector(dropout=0.3)
        network.layers = nn.Sequential(
            nn.Linear(3, WIDE), nn.SiLU(), nn.Linear(WIDE, WIDE), nn.SiLU(), nn.Dropout(0.3), nn.Linear(WIDE, 2)
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in network.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
        return {"student": Trained(network)}


def mixed() -> nn.Module:
    """One weight of each kind: a matrix, a bias, a convolution, a table of embeddings."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        OrderedDict(linear=nn.Linear(5, 3), conv=nn.Conv2d(2, 2, 3, bias=False), table=nn.Embedding(4, 3))
    )


def step(module: nn.Module, spec: OptimizerSpec, lr: float = 0.1) -> tuple[PlainTrainable, dict[str, torch.Tensor]]:
    """The network after a step on a loss that is linear in its weights, and the gradients of that loss."""
    trainable = PlainTrainable("student", Trained(module), spec)
    trainable.activate(True)
    torch.manual_seed(1)
    gradients = {name: torch.randn(p.shape) for name, p in module.named_parameters()}
    trainable.backward(sum((p * gradients[name]).sum() for name, p in module.named_parameters()))
    trainable.step(lr, trainable.gradient_norm())
    return trainable, gradients


@pytest.mark.parametrize("shape", [(24, 6), (6, 24)])
def test_a_step_of_muon_is_the_orthogonal_part_of_the_gradient_as_large_as_a_step_of_adamw(shape):
    """Liu et al. 2025, eq. 4: 0.2 sqrt(max(A, B)) U V^T. Newton-Schulz in bfloat16 finds it to about a third."""
    layer = nn.Linear(shape[1], shape[0], bias=False)
    before = layer.weight.detach().clone()
    _, gradients = step(layer, OptimizerSpec(name="muon", clip=None), lr=0.01)
    u, _, vh = torch.linalg.svd(gradients["weight"], full_matrices=False)
    parts = u.T @ (before - layer.weight.detach()) @ vh.T / (0.01 * 0.2 * max(shape) ** 0.5)
    sizes = parts.diagonal()
    assert sizes.min() > 0.6 and sizes.max() < 1.3
    assert (parts - torch.diag(sizes)).abs().max() < 0.05


def test_muon_decays_weights_as_adamw_does():
    found = []
    for decay in (0.0, 0.5):
        layer = nn.Linear(6, 4, bias=False)
        with torch.no_grad():
            layer.weight.fill_(2.0)
        step(layer, OptimizerSpec(name="muon", clip=None, weight_decay=decay))
        found.append(layer.weight.detach())
    torch.testing.assert_close(found[0] - found[1], torch.full((4, 6), 0.1 * 0.5 * 2.0), rtol=1e-4, atol=1e-6)


def test_muon_leaves_what_is_no_matrix_to_adamw(tmp_path):
    ours, theirs = mixed(), mixed()
    trainable, _ = step(ours, OptimizerSpec(name="muon"))
    step(theirs, OptimizerSpec())
    same = {name for name, p in ours.named_parameters() if torch.equal(p, theirs.get_parameter(name))}
    assert same == {"linear.bias", "conv.weight", "table.weight"}
    kept = {name.rpartition("/")[2] for name in trainable.state().tensors if name.startswith("linear.weight/")}
    assert kept == {"momentum_buffer"}
    said = "student: muon trains 1 of 4 parameters, 23% of the elements; adamw trains those that are"
    assert trainable.optimizers.note.startswith(said)


def test_muon_says_what_it_trains_in_the_log(tmp_path):
    train(tmp_path, images=16, optimizer={"name": "muon"})
    notes = [event["text"] for event in read_events(RunPaths(tmp_path)) if event["event"] == "note"]
    assert len(notes) == 1 and notes[0].startswith("student: muon trains 2 of 4 parameters, 82% of the elements; ")


def test_8_bits_keep_small_weights_exact_and_large_ones_close():
    """The root mean square of the difference to AdamW, relative to that of five steps."""
    small, wide = nn.Linear(8, 8), nn.Linear(WIDE, WIDE, bias=False)
    for layer, tolerance in ((small, 1e-4), (wide, 0.05)):
        before = layer.weight.detach().clone()
        alike = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        alike.load_state_dict(layer.state_dict())
        for module, name in ((layer, "adamw_8bit"), (alike, "adamw")):
            trainable = PlainTrainable("student", Trained(module), OptimizerSpec(name=name, weight_decay=0.05))
            trainable.activate(True)
            for number in range(5):
                torch.manual_seed(number)
                trainable.backward((module(torch.randn(4, layer.in_features)) - 1).square().mean())
                trainable.step(0.01, trainable.gradient_norm())
        error = (layer.weight - alike.weight).square().mean() / (alike.weight - before).square().mean()
        assert error.sqrt() < tolerance, (layer, error.sqrt())


@pytest.mark.parametrize("name", ["muon", "adamw_8bit"])
def test_resuming_changes_no_bit(tmp_path, name):
    optimizer = {"name": name, "lr": 0.01, "weight_decay": 0.01}
    whole = train(tmp_path / "whole", Wide(), images=80, optimizer=optimizer)
    with pytest.raises(KilledError):
        train(tmp_path / "again", Wide(), KilledAt(fault=3), images=80, optimizer=optimizer)
    again = train(tmp_path / "again", Wide(), images=80, optimizer=optimizer)
    assert_same(bits(again), bits(whole))
    assert saved(tmp_path / "again") == saved(tmp_path / "whole")


@pytest.mark.parametrize("name", ["adamw_8bit", "muon"])
@pytest.mark.parametrize("make", [mixed, lambda: nn.Linear(WIDE, WIDE)])
def test_the_bytes_of_the_state_are_known_before_the_first_step(name, make):
    module, spec = make(), OptimizerSpec(name=name)
    expected = optimizers.state_bytes(spec, module)
    trainable, _ = step(module, spec)
    tables = ("qmap1", "qmap2")  # 1 KiB each, for all weights together
    counted = {key: t.nbytes for key, t in trainable.state().tensors.items() if t.ndim and not key.endswith(tables)}
    assert sum(counted.values()) == expected
    if name == "adamw_8bit" and not isinstance(module, nn.ModuleDict):
        assert expected < 0.27 * 8 * sum(p.numel() for p in module.parameters())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError) as error:
        optimizers.state_bytes(OptimizerSpec(name="adamw_8bit"), nn.Linear(1, 1))
    assert str(error.value) == (
        "optimizer.name: adamw_8bit needs the package bitsandbytes, which is not installed; "
        "pip install 'distill[adamw-8bit]', or use adamw"
    )
    assert optimizers.state_bytes(OptimizerSpec(), nn.Linear(1, 1)) is None


def test_the_default_has_the_digest_of_earlier_versions():
    content = {"kind": "train", "recipe": "reflow/reflow", "images": 128}
    plain = stage_content(TrainStage.model_validate(content))
    assert set(plain["optimizer"]) == {
        "lr", "betas", "eps", "weight_decay", "warmup_images", "decay", "clip",
    }  # fmt: skip
    named = TrainStage.model_validate({**content, "optimizer": {"name": "adamw"}})
    assert stage_content(named) == plain
    other = TrainStage.model_validate({**content, "optimizer": {"name": "muon", "momentum": 0.9}})
    assert stage_content(other)["optimizer"]["name"] == "muon"
