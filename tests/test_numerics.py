"""`numerics` and `compile` of a spec: what they set, the digest, what they refuse, and compiled training."""

import os

import pytest
import torch
from diffusers import DiTTransformer2DModel
from programs.train_vector import FlowMatching, Vector, train
from test_workflow import images, mistakes
from torch import nn

from distill.core.errors import InputError
from distill.execution import devices
from distill.protocols import Trained
from distill.spec import specfile
from distill.training import blocks
from distill.training.blocks import Blocks


@pytest.fixture
def flags():
    """Restores what `set_numerics` changes."""
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield seen
    devices.set_numerics("exact")
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if before is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = before


def seen() -> dict[str, object]:
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    sums = cuda.allow_bf16_reduced_precision_reduction, cuda.allow_fp16_reduced_precision_reduction
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "tf32": (cuda.allow_tf32, cudnn.allow_tf32),
        "low precision sums": sums,
        "cudnn": (cudnn.deterministic, cudnn.benchmark),
    }


def test_exact_and_fast_set_all_flags_that_change_numbers(flags, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    devices.set_numerics("fast")
    assert flags() == {
        "deterministic": False,
        "workspace": None,
        "tf32": (True, True),
        "low precision sums": (True, True),
        "cudnn": (False, True),
    }
    devices.set_numerics("exact")
    assert flags() == {
        "deterministic": True,
        "workspace": ":4096:8",
        "tf32": (False, False),
        "low precision sums": (False, False),
        "cudnn": (True, False),
    }
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_an_operation_that_is_not_deterministic_is_named_with_advice(flags):
    devices.set_numerics("exact")
    with pytest.raises(InputError) as error, devices.explained():
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert str(error.value) == (
        "numerics: exact needs deterministic operations, but put_ has no deterministic implementation on this device; "
        "set numerics: fast in the spec"
    )
    with pytest.raises(RuntimeError, match="another"), devices.explained():
        raise RuntimeError("another")


def test_the_digest_has_them_unless_they_are_the_default():
    def digest(**changes):
        return specfile.validate({**images(), **changes}, "f").digest()

    assert digest() == digest(numerics="exact", compile=False)
    assert len({digest(), digest(numerics="fast"), digest(numerics="fast", compile=True)}) == 3


FAST = {"numerics": "fast", "compile": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            images() | {"compile": True},
            "compile: compiled networks round differently on other machines and versions; set numerics: fast for it",
        ),
        (
            images() | FAST | {"launch": {"zero_stage": 3}},
            "compile: does not work with launch.zero_stage: 3, which gathers the weights of each layer while it is "
            "called; compiled blocks call their layers together",
        ),
        (
            images(t={"recipe": "shortcut/meanflow"}) | FAST,
            "compile: stages.t uses forward-mode derivatives, which torch.compile does not support; set derivative: "
            "central, or compile: false",
        ),
    ],
)
def test_what_does_not_fit_is_refused(content, message):
    assert message in mistakes(content)


def test_offloading_without_recomputing_is_refused():
    assert (
        "launch.activation_offload: has no effect without activation_checkpointing; set that, too, or remove it"
        in mistakes(images() | {"launch": {"activation_offload": True}})
    )


def dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, num_layers=3, sample_size=4, patch_size=2,
        norm_type="ada_norm_zero", num_embeds_ada_norm=10,
    )  # fmt: skip


def gradients(network: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 2, 4, 4)
    network.zero_grad()
    network.eval()  # it drops labels in training
    labels = torch.zeros(2, dtype=torch.int64)
    with torch.random.fork_rng():
        network(x, timestep=torch.tensor([10, 500]), class_labels=labels).sample.square().mean().backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


def test_offloaded_activations_change_no_bit(monkeypatch):
    """And they are offloaded: the inputs of each block go to the host, and nothing else."""
    moved = []

    class Counting(blocks.save_on_cpu):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: moved.append(tensor.shape) or pack(tensor)

    monkeypatch.setattr(blocks, "save_on_cpu", Counting)
    plain, again, off = dit(), dit(), dit()
    for each in (plain, again, off):
        each.train()
    blocks.recompute("a recipe", [again])
    blocks.recompute("a recipe", [off], offload=True)
    kept = [gradients(each) for each in (plain, again, off)]
    assert all(torch.equal(a, b) for a, b in zip(kept[1], kept[2], strict=True))
    for a, b in zip(kept[0], kept[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert moved.count(torch.Size([2, 4, 16])) == 3, moved


def compiled(network: nn.Module) -> list[str]:
    """The names of the modules that are compiled."""
    return [name for name, each in network.named_modules() if each._compiled_call_impl is not None]


def test_repeated_blocks_are_compiled_one_by_one_and_other_networks_whole():
    network, vector = dit(), Vector()
    blocks.compile_networks([network, vector])
    names = compiled(network)
    assert (names == [""] or all(name.startswith("transformer_blocks.") for name in names)) and compiled(vector) == [""]


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(blocks.environment, "has_compiler", lambda: False)
    with pytest.raises(InputError, match="no C.. compiler found .g.., clang.. or c...; install one, or set"):
        blocks.compile_networks([Vector()])


@pytest.mark.long
def test_compiled_training_is_close_to_eager_training(tmp_path):
    class Plain(FlowMatching):
        def networks(self, init):
            return {"student": Trained(Vector(width=32))}

    eager = train(tmp_path / "eager", Plain(), images=64)
    fast = train(tmp_path / "fast", Plain(), images=64, blocks=Blocks(compiled=True))
    assert compiled(fast.roles.networks["student"]) == [""]
    for name, value in eager.roles.networks["student"].named_parameters():
        torch.testing.assert_close(fast.roles.networks["student"].get_parameter(name), value, rtol=1e-4, atol=1e-5)
