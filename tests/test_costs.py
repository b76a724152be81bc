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
from distill.execution.model_costs import Growth, NetworkCosts, costs_of, count_network, process_memory
from distill.plans import costs, device_kinds, facts
from distill.plans.costs import Assumptions, Machines, StepTime, StepWork, sent_bytes
from distill.spec.model import LaunchSpec
from distill.students.lora_start import attention_layers
from distill.teachers.architectures import known
from distill.teachers.convention import Asked
from distill.training import blocks, memory
from distill.training.counting import count
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


def counted(build, *, bf16, recompute):
    network, call = build()
    network.train()
    if recompute:
        blocks.recompute("", [network])
    return count_network(network, call, bf16=bf16)


def test_operations_of_a_linear_layer():
    layer = nn.Linear(5, 7)
    found = count(lambda: layer(torch.zeros(3, 5)))
    assert found.forward == 2 * 3 * 5 * 7
    assert found.training == 2 * found.forward  # no gradient of the input is needed
    deep = nn.Sequential(nn.Linear(5, 5, bias=False), layer)
    assert count(lambda: deep(torch.zeros(3, 5))).training == 2 * 2 * 3 * 5 * 5 + 3 * found.forward
    assert found.activations == 4 * 3 * 5  # the input


def test_operations_of_a_convolution():
    layer = nn.Conv2d(3, 8, 3, padding=1)
    found = count(lambda: layer(torch.zeros(2, 3, 10, 6)))
    assert found.forward == 2 * 2 * 10 * 6 * 8 * 3 * 3 * 3
    assert found.training == 2 * found.forward


@pytest.mark.parametrize("mask", [None, torch.ones(6, 6, dtype=torch.bool)])
def test_operations_of_attention(mask):
    """Two products forward; backward four, and the first one again."""
    x = torch.zeros(2, 4, 6, 8, requires_grad=True)
    found = count(lambda: functional.scaled_dot_product_attention(x, x, x, attn_mask=mask))
    product = 2 * 2 * 4 * 6 * 6 * 8
    assert (found.forward, found.training) == (2 * product, (2 + 5) * product)
    inputs, rows = x.nbytes, 2 * 4 * 6
    assert found.activations == 2 * inputs + 4 * rows + (0 if mask is None else 4 * mask.numel())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_tensors_without_values_count_as_real_ones(build, bf16, recompute):
    with FakeTensorMode():
        pretended = counted(build, bf16=bf16, recompute=recompute)
    real = counted(build, bf16=bf16, recompute=recompute)
    assert replace(pretended, activations=real.activations) == real
    for samples in (1, 2, 5):
        assert pretended.activations.of(samples) == pytest.approx(real.activations.of(samples), rel=0.1)


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_activations_of_more_samples_are_known_from_two(build):
    network, call = build()
    assert counted(build, bf16=False, recompute=False).activations.of(5) == pytest.approx(
        count(lambda: call(5)).activations, rel=0.01
    )


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_recomputation_keeps_less_and_computes_more(build):
    kept, again = (counted(build, bf16=False, recompute=each) for each in (False, True))
    assert again.activations.of(4) < 0.7 * kept.activations.of(4)
    assert kept.training < again.training <= kept.training + kept.forward
    assert again.forward == kept.forward


def test_norms_are_in_float32_under_autocast_as_on_gpus():
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    count_network(network, lambda samples: network(torch.zeros(samples, 4)), bf16=True)
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


@pytest.mark.parametrize("name", SMALL)
def test_a_published_model_is_called_as_its_convention_says(name):
    model = small(name)
    network, convention = getattr(diffusers, model.network)(**model.config).train(), known()[model.network]
    cond = {
        key: torch.ones(3, *(model.tokens if side is None else side for side in field.shape), dtype=field.dtype)
        for key, field in convention.fields(network.config).items()
    }
    constants = convention.constants(network.config, Asked((128, 128)))
    cond |= {key: each.expand(3, *each.shape) for key, each in constants.items()}
    real = count(lambda: convention.call(network, torch.zeros(3, 4, 16, 16), torch.ones(3), cond))
    found = costs_of(model, bf16=False)
    assert (3 * found.forward, 3 * found.training) == (real.forward, real.training)
    assert found.activations.of(3) == pytest.approx(real.activations, rel=0.1)
    assert sum(found.trained) == sum(each.numel() for each in network.parameters())
    assert found.still == []


@pytest.mark.parametrize("name", ["sdxl", "flux.1-dev"])
def test_adapters_are_trained_in_the_attention_alone(name):
    model, rank = small(name), 2
    whole, found = costs_of(model, bf16=False), costs_of(model, bf16=False, lora_rank=rank)
    network = getattr(diffusers, model.network)(**model.config)
    layers = [network.get_submodule(each) for each in attention_layers(network)]
    assert sum(found.trained) == sum(rank * (each.in_features + each.out_features) for each in layers)
    assert sum(found.still) == sum(whole.trained)
    assert found.forward > whole.forward and found.training < whole.training


# --- memory ---

TRAINED, STILL = [100, 7], [20]
COSTS = NetworkCosts(TRAINED, STILL, 10, 30, Growth(64, 1000))


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
    found = process_memory({"student": COSTS}, LaunchSpec(procs=procs, **options), 3, averages=2, frozen=500)
    expected = memory.predict({"student": TRAINED}, [], 2, procs, sharding, {"student": STILL})
    assert found == {**expected, "frozen": 500, "activations": 64 + 3 * 1000}


def test_what_is_offloaded_or_divided_leaves_the_gpu():
    launch = LaunchSpec(procs=2, zero_stage=3, divide_teacher=True, offload_optimizer=True)
    found = process_memory({"student": COSTS}, launch, 1, frozen=500)
    assert (found["optimizer"], found["frozen"]) == (0, 250)


@pytest.mark.parametrize(("stage", "moments"), [(None, 2), (1, 3), (3, 3)])  # ZeRO has master weights, too
def test_a_process_updates_the_weights_whose_moments_it_has(stage, moments):
    launch = LaunchSpec(procs=2, zero_stage=stage)
    held = process_memory({"student": COSTS}, launch, 1)["optimizer"]
    assert held == moments * 4 * costs.updated_weights(stage, 2, TRAINED)


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


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="no kind of GPU 'a100' is known; .*valid: a100-40gb, a100-80gb, b200"):
        device_kinds.kind_of("a100")
