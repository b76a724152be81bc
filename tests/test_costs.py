"""What training costs: counts against formulas and real tensors, and times against calculations by hand."""

from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from distill.core.errors import InputError
from distill.execution.layouts import process_memory
from distill.execution.rehearsal import Growth, TrainingCosts, UpdateCosts, forward_operations, in_float32_norms
from distill.plans import costs, device_kinds, facts
from distill.plans.costs import Assumptions, Machines, StepTime, StepWork, sent_bytes
from distill.spec.model import CheckpointTeacher, LaunchSpec
from distill.teachers.architectures import known
from distill.teachers.convention import Asked
from distill.teachers.of_facts import teacher_of
from distill.training import blocks, memory
from distill.training.counting import count_forward, count_turn
from distill.training.plain import PLAIN
from distill.training.zero import Zero

# --- operations and activations ---


def dit():
    network = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        num_layers=3,
        sample_size=16,
        num_embeds_ada_norm=10,
    )

    def call(samples):
        x, t, label = torch.zeros(samples, 4, 16, 16), torch.ones(samples), torch.ones(samples, dtype=torch.long)
        return network(x, timestep=t, class_labels=label, return_dict=False)[0]

    return network, call


def sd3():
    network = SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=4,
        caption_projection_dim=64, joint_attention_dim=32, pooled_projection_dim=24, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip

    def call(samples):
        x, text = torch.zeros(samples, 4, 16, 16), torch.zeros(samples, 7, 32)
        pooled, t = torch.zeros(samples, 24), torch.ones(samples)
        return network(x, text, pooled, t, return_dict=False)[0]

    return network, call


def u_net():
    network = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip

    def call(samples):
        x, text = torch.zeros(samples, 4, 16, 16), torch.zeros(samples, 7, 32)
        return network(x, torch.ones(samples), text, return_dict=False)[0]

    return network, call


NETWORKS = {"dit": dit, "sd3": sd3, "u-net": u_net}


def counted(build, samples=1, *, bf16, recompute):
    """(operations without gradients, counts with them) of a call."""
    network, call = build()
    network.train()
    if recompute:
        blocks.recompute("", [network])
    if bf16:
        in_float32_norms([network])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        return count_forward(lambda: call(samples)), count_turn(lambda: call(samples))


def test_operations_of_a_linear_layer():
    layer = nn.Linear(5, 7)
    forward, turn = count_forward(lambda: layer(torch.zeros(3, 5))), count_turn(lambda: layer(torch.zeros(3, 5)))
    assert forward == 2 * 3 * 5 * 7
    assert turn.operations == 2 * forward  # no gradient of the input is needed
    deep = nn.Sequential(nn.Linear(5, 5, bias=False), layer)
    assert count_turn(lambda: deep(torch.zeros(3, 5))).operations == 2 * 2 * 3 * 5 * 5 + 3 * forward
    assert turn.activations == 4 * 3 * 5  # the input


def test_operations_of_a_convolution():
    layer = nn.Conv2d(3, 8, 3, padding=1)
    forward = count_forward(lambda: layer(torch.zeros(2, 3, 10, 6)))
    assert forward == 2 * 2 * 10 * 6 * 8 * 3 * 3 * 3
    assert count_turn(lambda: layer(torch.zeros(2, 3, 10, 6))).operations == 2 * forward


@pytest.mark.parametrize("mask", [None, torch.ones(6, 6, dtype=torch.bool)])
def test_operations_of_attention(mask):
    """Two products forward; backward four, and the first one again."""
    x = torch.zeros(2, 4, 6, 8, requires_grad=True)

    def call():
        return functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    product, found = 2 * 2 * 4 * 6 * 6 * 8, count_turn(call)
    assert (count_forward(call), found.operations) == (2 * product, (2 + 5) * product)
    inputs, rows = x.nbytes, 2 * 4 * 6
    assert found.activations == 2 * inputs + 4 * rows + (0 if mask is None else 4 * mask.numel())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_tensors_without_values_count_as_real_ones(build, bf16, recompute):
    for samples in (1, 5):
        with FakeTensorMode():
            forward, pretended = counted(build, samples, bf16=bf16, recompute=recompute)
        expected, real = counted(build, samples, bf16=bf16, recompute=recompute)
        assert (forward, pretended.operations) == (expected, real.operations)
        assert pretended.activations == pytest.approx(real.activations, rel=0.1)


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_recomputation_keeps_less_and_computes_more(build):
    (forward, kept), (same, again) = (counted(build, 4, bf16=False, recompute=each) for each in (False, True))
    assert again.activations < 0.7 * kept.activations
    assert kept.operations < again.operations <= kept.operations + forward
    assert same == forward


def test_norms_are_in_float32_under_autocast_as_on_gpus():
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    in_float32_norms([network])
    seen = []
    network[1].register_forward_hook(lambda *each: seen.append(each[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert network[0](torch.zeros(1, 4)).dtype == torch.bfloat16
        network(torch.zeros(1, 4))
    assert seen == [torch.float32]


# --- networks of published models, in small ---

SMALL = {
    "z-image": {
        "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 24, "axes_dims": [4, 6, 6], "axes_lens": [128, 16, 16],
    },
    "qwen-image": {
        "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "axes_dims_rope": [4, 6, 6],
    },
    "sdxl": {
        "sample_size": 16, "block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 24,
        "attention_head_dim": 8, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64,
    },
    "flux.1-dev": {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "pooled_projection_dim": 12, "axes_dims_rope": [4, 6, 6], "guidance_embeds": True,
    },
}  # fmt: skip


def small(name):
    """The facts about a model, with a small network in place of its own."""
    change = {"config": SMALL[name], "sample": [4, 16, 16], "pixels": [128, 128], "tokens": 5}
    return facts.facts_of(name).model_copy(update=change)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SMALL)
def test_a_published_model_is_called_as_its_convention_says(name, dtype):
    model = small(name)
    network, convention = getattr(diffusers, model.network)(**model.config).train(), known()[model.network]
    cond = {
        key: torch.ones(3, *(model.tokens if side is None else side for side in field.shape), dtype=field.dtype)
        for key, field in convention.fields(network.config).items()
    }
    constants = convention.constants(network.config, Asked((128, 128)))
    cond |= {key: each.expand(3, *each.shape) for key, each in constants.items()}
    real = count_forward(lambda: convention.call(network, torch.zeros(3, 4, 16, 16), torch.ones(3), cond))
    found = teacher_of(model, CheckpointTeacher(path="a/b", dtype=dtype))
    assert 3 * forward_operations(found) == real
    assert all(each.is_meta and str(each.dtype) == f"torch.{dtype}" for each in found.network.parameters())
    assert (found.shape, found.description) == ((4, 16, 16), model.title)


@pytest.mark.parametrize("name", ["sdxl", "flux.1-dev"])
def test_a_model_makes_samples_of_the_size_that_is_asked_for(name):
    assert teacher_of(small(name), CheckpointTeacher(path="a/b", size=[64, 96])).shape == (4, 8, 12)
    with pytest.raises(InputError, match=r"teacher.size: .* makes samples of size \[height, width\]; give 2 numbers"):
        teacher_of(small(name), CheckpointTeacher(path="a/b", size=[5, 64, 96]))


def test_a_video_has_a_latent_frame_for_every_four():
    model = facts.facts_of("wan2.1-1.3b").model_copy(
        update={"config": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16}}
    )
    assert teacher_of(model, CheckpointTeacher(path="a/b", size=[9, 64, 96])).shape == (16, 3, 8, 12)


# --- memory ---

TRAINED, STILL = {"student": [100, 7]}, {"student": [20]}
COSTS = TrainingCosts(
    TRAINED, STILL, copies=[], averages=2, moments=None, frozen=500, shared=False, updates={"student": 1},
    teacher_calls=0, steps={again: UpdateCosts(30.0, Growth(64, each)) for again, each in ((False, 1000), (True, 10))},
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sharding"),
    [
        ({}, PLAIN),
        ({"zero_stage": 1}, Zero(1)),
        ({"zero_stage": 2}, Zero(2)),
        ({"zero_stage": 3, "zero_persistence_threshold": 0}, Zero(3, persistence_threshold=0)),
    ],
)
@pytest.mark.parametrize("procs", [1, 2, 4])
def test_memory_is_that_of_the_prediction_and_activations(options, sharding, procs):
    found = process_memory(COSTS, LaunchSpec(procs=procs, **options), 3)
    expected = memory.predict(TRAINED, [], 2, procs, sharding, STILL)
    assert found == {**expected, "frozen": 500, "activations": 64 + 3 * 1000}


def test_what_is_offloaded_divided_or_recomputed_leaves_the_gpu():
    launch = LaunchSpec(
        procs=2, zero_stage=3, divide_teacher=True, offload_optimizer=True, activation_checkpointing=True
    )
    found = process_memory(COSTS, launch, 1)
    assert (found["optimizer"], found["frozen"], found["activations"]) == (0, 250, 74)


@pytest.mark.parametrize(("stage", "moments"), [(None, 2), (1, 3), (3, 3)])  # ZeRO has master weights, too
def test_a_process_updates_the_weights_whose_moments_it_has(stage, moments):
    held = process_memory(COSTS, LaunchSpec(procs=2, zero_stage=stage), 1)["optimizer"]
    assert held == moments * 4 * costs.updated_weights(stage, 2, TRAINED["student"])


# --- communication and time ---


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_one_process_sends_nothing(stage):
    assert sent_bytes(stage, 1, 1000, 1000, micro_batches=4, gathered=77) == 0


@pytest.mark.parametrize(
    ("stage", "micro_batches", "times"),
    [(None, 1, 2), (0, 1, 2), (1, 1, 2), (2, 1, 2), (3, 1, 3), (None, 4, 2), (1, 4, 2), (2, 4, 5), (3, 4, 12)],
)
def test_a_process_sends_as_much_as_zero_says(stage, micro_batches, times):
    assert sent_bytes(stage, 4, 1000, 1000, micro_batches) == times * 3 * 4 * 1000 // 4


def test_adapters_are_sent_and_weights_that_stay_still_are_not():
    assert sent_bytes(None, 2, 10, 1000) == 2 * 4 * 10 // 2
    assert sent_bytes(3, 2, 10, 1000) == (4 * 10 + 2 * 4 * 1000) // 2
    assert sent_bytes(None, 2, 10, 1000, gathered=600) == 4 * 10 + 300


H100 = device_kinds.kind_of("h100")
FAST = replace(H100, peaks={"bf16": 1e12, "tf32": 1e12, "fp32": 1e12}, bandwidth=1e9, link=1e9, network=1e8)
NODE = Machines(FAST, 1, 8)
ALL = Assumptions(utilisation=0.5, bandwidth=1.0, hidden=0.5)


def test_time_of_a_step_by_hand():
    work = StepWork(operations=1e12, sent=2 * 10**9, updated=10**6)
    found = costs.step_time(work, NODE, "bf16", ALL)
    assert found == StepTime(compute=2.0, communication=2.0, waiting=1.0, update=0.028)
    assert found.total == pytest.approx(3.028)
    assert costs.step_time(work, NODE, "bf16", replace(ALL, hidden=1.0)).waiting == 0


def test_nodes_share_the_network_cards_of_their_gpus():
    assert NODE.link == 1e9
    assert Machines(FAST, 2, 8).link == 8e8
    assert Machines(FAST, 2, 4).link == 4e8
    assert (Machines(H100, 128, 8).procs, Machines(H100, 128, 8).link) == (1024, 400e9)


@pytest.mark.parametrize("sent", [0, 10**9, 4 * 10**9])
def test_a_measured_step_replaces_the_utilisation(sent):
    work = StepWork(operations=1e12, sent=sent, updated=10**6)
    measured = costs.step_time(work, NODE, "bf16", replace(ALL, utilisation=0.23)).total
    assert costs.calibrated(work, NODE, "bf16", measured, ALL).utilisation == pytest.approx(0.23)


def test_a_step_that_is_too_short_calibrates_nothing():
    with pytest.raises(ValueError, match="a step of 0.01 s leaves no time to compute: the update takes 0.028 s"):
        costs.calibrated(StepWork(1e12, 0, 10**6), NODE, "bf16", 0.01, ALL)


def test_time_until_the_end():
    found = costs.training_time(StepTime(1.5, 0, 0, 0.5), NODE, batch_size=64, images=64 * 3600)
    assert (found.images_per_second, found.seconds, found.gpu_hours) == (32.0, 7200.0, 16.0)


# --- kinds of GPUs ---


@pytest.mark.parametrize("name", device_kinds.KINDS)
def test_a_kind_of_gpus_is_plausible_and_has_a_source(name):
    kind = device_kinds.kind_of(name)
    assert kind.peaks["bf16"] > 1.9 * kind.peaks["tf32"] and kind.peaks["tf32"] >= kind.peaks["fp32"]
    assert kind.bandwidth > kind.link > kind.network
    assert f"{kind.memory // 10**9} GB" in kind.title and "NVIDIA" in kind.source and "network" in kind.source


@pytest.mark.parametrize(
    ("text", "count", "name"), [("8xh100", 8, "h100"), ("4x80GB", 4, "a100-80gb"), ("1x24GB", 1, "rtx-4090")]
)
def test_gpus_are_given_by_their_kind_or_their_memory(text, count, name):
    assert device_kinds.gpus_of(text) == (count, device_kinds.kind_of(name))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h100", "h100 given; valid: the GPUs of a node, like 8xh100 or, with their memory alone, 8x80GB"),
        ("0xh100", "0xh100 given"),
        ("8xv100", "no kind of GPU 'v100' is known"),
        ("8x79GB", "no kind of GPU with 79GB is known; valid: 24GB, 40GB, 48GB, 80GB, 141GB, 180GB"),
    ],
)
def test_other_gpus_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        device_kinds.gpus_of(text)


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="no kind of GPU 'a100' is known; .*valid: a100-40gb, a100-80gb, b200"):
        device_kinds.kind_of("a100")
