"""Low-rank adapters: they start as their base network, only they are trained, they resume, and export merges them."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from runs import folder_bytes
from safetensors.torch import load_file
from torch import nn

from distill import testing
from distill.core.errors import InputError
from distill.core.stop import StopRequest
from distill.execution import preflight, stages, train_stage
from distill.execution.estimate import estimate
from distill.execution.forecast import forecast
from distill.networks.adapters import adaptable, as_trained, merged
from distill.networks.architectures import build
from distill.protocols import Adapter, Trained
from distill.runs.run_store import RunPaths
from distill.spec.model import RunSpec, UNetSpec
from distill.spec.resolved import resolve
from distill.students.loaded import load_student
from distill.training import checkpoint

PROGRAMS = Path(__file__).parent / "programs"
SUBJECT = testing.Subject("./adapted.py", base=PROGRAMS)
CPU = torch.device("cpu")
CHECKS = [each for each in testing.CHECKS if each.__name__ != "is_right"]


def unet():
    return build(UNetSpec(kind="unet", channels=[8], norm_groups=4, attention=True), (1, 8, 8), None, 0)


def adapter(module, targets=("to_q", "conv_in"), **options):
    return Adapter(module, 2, 4.0, targets, **options)


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_recipe_of_adapters_keeps_what_every_recipe_must(check, tmp_path):
    check(SUBJECT, tmp_path)


def test_it_starts_as_its_base_and_leaves_it_alone():
    base = unet()
    before = weights(base)
    role = as_trained("student", adapter(base, lr=3.0), 0)
    assert isinstance(role, Trained) and role.lr == 3.0 and role.module is not base
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 500.0)
    torch.testing.assert_close(role.module(x, t).sample, base(x, t).sample, rtol=0, atol=1e-6)
    moving = {name: p for name, p in role.module.named_parameters() if p.requires_grad}
    assert len(moving) == 2 * 5 and all("lora_" in name for name in moving)  # to_q of four attentions, a convolution
    assert not any(p.any() for name, p in moving.items() if "lora_B" in name), "its product is 0, exactly"
    still = {name.replace(".base_layer", ""): tensor for name, tensor in weights(role.module).items()}
    assert all(torch.equal(still[name], tensor) for name, tensor in before.items())
    assert weights(base).keys() == before.keys() and all(p.requires_grad for p in base.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(base).items())


def test_the_first_weights_depend_on_seed_and_network_alone():
    base = unet()
    torch.manual_seed(1)
    first, state = weights(as_trained("student", adapter(base), 0).module), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator has moved"
    torch.manual_seed(2)
    again = weights(as_trained("student", adapter(base), 0).module)
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = "conv_in.lora_A.default.weight"
    for name, seed in (("student", 1), ("critic", 0)):
        assert not torch.equal(first[drawn], weights(as_trained(name, adapter(base), seed).module)[drawn])


def test_merging_changes_nothing_but_rounding_and_leaves_a_plain_network():
    base = unet()
    role = adapter(base)
    network = as_trained("student", role, 0).module.eval()
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 500.0)
    adapted = network(x, t).sample
    found = merged(role, network)
    assert [type(layer) for layer in found.modules()] == [type(layer) for layer in base.modules()]
    assert found.state_dict().keys() == base.state_dict().keys() and vars(found).keys() == vars(base).keys()
    torch.testing.assert_close(found(x, t).sample, adapted, rtol=0, atol=1e-5 * adapted.abs().max().item())
    changed = {name for name, tensor in found.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])}
    assert changed == {name for name in base.state_dict() if re.search(r"(to_q|conv_in)\.weight$", name)}
    delta = (found.state_dict()["conv_in.weight"] - base.state_dict()["conv_in.weight"]).detach().flatten(1)
    assert torch.linalg.matrix_rank(delta, rtol=1e-4) == 2
    assert merged(Trained(base), base) is base


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "Adapter: rank=0; valid: a whole number above 0"),
        ({"alpha": 0.0}, "Adapter: alpha=0.0; valid: a finite number above 0"),
        ({"lr": float("nan")}, "Adapter: lr=nan; valid: a finite number above 0"),
        ({"targets": ()}, "Adapter: targets is empty; name at least one layer"),
    ],
)
def test_adapters_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Adapter(**{"module": nn.Linear(1, 1), "rank": 1, "alpha": 1.0, "targets": ("x",), **options})


def test_a_target_that_no_layer_has_is_refused_with_those_there_are():
    said = (
        "network 'student': the adapter's target 'to_queue' matches no linear or convolution layer (by full "
        "name or last part); did you mean 'to_q'? valid: conv1, "
    )
    with pytest.raises(InputError, match=re.escape(said)) as error:
        as_trained("student", adapter(unet(), ("conv1", "to_queue")), 0)
    listed = str(error.value).partition("valid: ")[2].split(", ")
    assert {"conv1", "conv_in", "to_k", "to_out.0", "to_q", "to_v"} <= set(listed)
    for name in listed:
        as_trained("student", adapter(unet(), (name,)), 0)
    with pytest.raises(
        InputError,
        match="the adapter's target 'norm1' matches no linear or convolution layer",
    ):
        as_trained("student", adapter(unet(), ("norm1",)), 0)
    with pytest.raises(InputError, match="target 'x' matches no linear or convolution layer .*; valid: 0, 2$"):
        as_trained("student", adapter(nn.Sequential(nn.Linear(1, 1), nn.SiLU(), nn.Linear(1, 1)), ("x",)), 0)


def test_a_convolution_with_groups_is_no_target():
    network = nn.ModuleDict({"depth": nn.Conv2d(4, 4, 3, groups=4), "point": nn.Conv2d(4, 4, 1)})
    with pytest.raises(InputError) as error:
        as_trained("student", adapter(network, ("depth",)), 0)
    assert str(error.value) == (
        "network 'student': the adapter's target 'depth' matches no linear or convolution layer (by full name or last "
        "part), except a convolution with groups, which cannot have an adapter; valid: point"
    )
    assert (
        adaptable(network).keys()
        == {"point"}
        == adaptable(as_trained("s", adapter(network, ("point",)), 0).module).keys()
    )


def test_without_peft_one_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        InputError, match=r"^an adapter needs the package peft; pip install 'distill\[train\]' installs it$"
    ):
        as_trained("student", adapter(nn.Sequential(nn.Linear(1, 1)), ("0",)), 0)


# --- a run ---

TRAIN = {
    "kind": "train", "pairs": "pairs", "images": 48, "batch_size": 16, "ema_half_lives": [16.0],
    "checkpoint": {"images": 16, "minutes": None, "keep": 3},
}  # fmt: skip
STAGES = {
    "pairs": {"kind": "pairs", "count": 32, "block": 16, "shard": 16, "steps": 2},
    "base": {**TRAIN, "recipe": "reflow/reflow", "network": {"kind": "mlp", "width": 8, "depth": 1}},
    "adapted": {**TRAIN, "recipe": "./adapted.py", "options": {"targets": ["layers.0"]}, "init": "base"},
}
GAUSSIAN = {"kind": "gaussian", "mean": [1.0, 2.0], "std": [0.5, 0.25]}


def go(folder):
    """A run of pairs, a base and its adapter, or what is left of it to do."""
    given, run = RunSpec.model_validate({"name": "r", "teacher": GAUSSIAN, "stages": STAGES}), RunPaths(folder / "r")
    run.root.mkdir(exist_ok=True)
    shutil.copy(PROGRAMS / "adapted.py", run.root)
    stages.run(run, given, list(given.stages), StopRequest())
    return run, given


def test_an_adapted_student_trains_resumes_to_the_bit_and_is_exported_as_a_plain_network(tmp_path):
    run, given = go(tmp_path)
    folder, training = run.student("adapted"), run.stage("adapted")
    assert not any(b"lora" in content for content in folder_bytes(folder).values())
    found, base = (
        load_file(run.student(name) / "unet" / "diffusion_pytorch_model.safetensors") for name in ("adapted", "base")
    )
    assert found.keys() == base.keys()
    assert {name for name in base if not torch.equal(found[name], base[name])} == {"layers.0.weight"}

    saved = checkpoint.weights(training.checkpoints, "student", 16.0)[0]
    role = adapter(load_student(run.student("base"), CPU).student, ("layers.0",))  # as the recipe has it
    adapted = as_trained("student", role, 0).module
    adapted.load_state_dict(saved)
    noise, t = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), torch.ones(64)
    train_stage.export_checkpoint(run, given, "adapted", 16.0, tmp_path / "averaged")
    averaged = load_student(tmp_path / "averaged", CPU).student
    with torch.no_grad():
        torch.testing.assert_close(averaged(noise, t, {}), adapted(noise, t, {}), rtol=0, atol=1e-5)
        assert not torch.allclose(averaged(noise, t, {}), role.module(noise, t, {}), atol=1e-4)

    whole, last = folder_bytes(folder), checkpoint.complete(training.checkpoints)
    bits = folder_bytes(last[0])
    for lost in (folder, *last[:2]):
        shutil.rmtree(lost)
    training.done.unlink()
    go(tmp_path)
    again = folder_bytes(last[0])
    assert bits.pop("meta.json") and again.pop("meta.json")
    assert again == bits and folder_bytes(folder) == whole


def test_what_an_adapter_costs_is_forecast(tmp_path):
    stage = {**STAGES["adapted"], "init": None, "network": {"kind": "mlp", "width": 64, "depth": 2}}
    given = RunSpec.model_validate({"name": "r", "teacher": GAUSSIAN, "stages": {**STAGES, "adapted": stage}})
    shutil.copy(PROGRAMS / "adapted.py", tmp_path)
    ready = preflight.check(resolve(given, tmp_path))
    whole = (34 + 1) * 64 + (64 + 1) * 64 + (64 + 1) * 2  # the input: 2 numbers and 32 of the time
    low = 2 * 34 + 64 * 2
    assert estimate(ready)["adapted"] == {
        "parameters": 4 * 2 * (whole + low), "gradients": 4 * low, "optimizer": 4 * 2 * low, "ema": 4 * low,
    }  # fmt: skip
    kept = 4 * (3 * (whole + low) + 2 * low)  # student, copy, average; two moments
    assert forecast(ready, here=False)["adapted"].bytes == 4 * whole + 3 * kept
