"""Smaller students of the teacher's network class: which weights they start with, and what is refused."""

import copy

import checkpoints
import pytest
import test_teacher_dit as dit
import test_teacher_sd3 as sd3
import tiny
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from latent import CPU, conditions, normal, seeded, write
from torch import nn

from distill.core.errors import InputError
from distill.exchange.student_card import StudentCard
from distill.execution import building
from distill.networks.edm_unet import SongUNet2DModel
from distill.networks.smaller import inheritance, smaller, spaced
from distill.networks.velocity_edm import VelocityEdmUNet2DModel
from distill.networks.velocity_unet import VelocityUNet2DModel
from distill.spec.model import CheckpointTeacher
from distill.students import smaller as students
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.loaded import load_student
from distill.teachers import LoadedTeacher, load_teacher
from distill.teachers.network_field import EdmField

X, T = normal(3, 4, 8, 8), torch.tensor([0.2, 0.6, 1.0])


def of(teacher, seed=0, **changes):
    """The velocity student of this size."""
    given = (teacher, None, teacher.shape, teacher.num_classes, seed, teacher)
    return StudentInit(*given, changes=changes).velocity_field()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """DiT with five blocks."""
    stock = dit.pipeline(num_embeds_ada_norm=3, num_layers=5)
    place = write(tmp_path_factory.mktemp("dit") / "dit", stock)
    return teacher_on_linear_path(load_teacher(CheckpointTeacher(path=str(place)), CPU))


@pytest.mark.parametrize(
    ("count", "of", "expected"),
    [
        (1, 3, [0]), (2, 3, [0, 2]), (2, 5, [0, 4]), (3, 4, [0, 2, 3]), (3, 12, [0, 6, 11]),
        (6, 12, [0, 2, 4, 7, 9, 11]), (4, 4, [0, 1, 2, 3]), (4, 2, [0, 0, 1, 1]), (2, 1, [0, 0]),
    ],
)  # fmt: skip
def test_blocks_are_spaced_evenly(count, of, expected):
    assert spaced(count, of) == expected


def test_blocks_have_the_weights_of_the_teachers_blocks(teacher):
    student, given = of(teacher, num_layers=3).network, teacher.network
    ours, theirs = student.state_dict(), given.state_dict()
    for name, weight in ours.items():
        parts = name.split(".")
        if parts[0] == "transformer_blocks":
            parts[1] = str([0, 2, 4][int(parts[1])])
        assert torch.equal(weight, theirs[".".join(parts)]), name
    assert student.config == {**given.config, "num_layers": 3}
    assert type(student) is DiTTransformer2DModel and student.training
    assert all(each.requires_grad for each in student.parameters())
    assert not {each.data_ptr() for each in ours.values()} & {each.data_ptr() for each in theirs.values()}


@torch.no_grad()
def test_a_student_without_blocks_that_do_nothing_is_the_teacher(teacher):
    """Blocks 1 and 3 of the teacher get gates of zero, so they return their input."""
    given = copy.deepcopy(teacher.network)
    for i in (1, 3):
        gates = given.transformer_blocks[i].norm1.linear
        gates.weight.zero_(), gates.bias.zero_()
    idle = students._with(teacher, given)
    student, cond = of(idle, num_layers=3).eval(), conditions(teacher, 3)
    assert torch.equal(student(X, T, cond), idle.field(X, T, cond))


def test_new_weights_depend_on_the_seed_only(teacher):
    torch.manual_seed(5)
    one = of(teacher, 1, num_attention_heads=1).network.state_dict()
    torch.manual_seed(6)
    again, other = (of(teacher, seed, num_attention_heads=1).network.state_dict() for seed in (1, 2))
    assert all(torch.equal(weight, again[name]) for name, weight in one.items())
    assert not torch.equal(
        one["transformer_blocks.0.attn1.to_q.weight"], other["transformer_blocks.0.attn1.to_q.weight"]
    )


def test_a_layer_is_copied_whole_or_not_at_all():
    """Another width of the feed-forward layers: their first bias changes, their second one has the same shape."""

    def network(hidden):
        return nn.Sequential(nn.Linear(3, hidden), nn.Linear(hidden, 3), nn.LayerNorm(3))

    found = inheritance(network(4), network(8))
    assert found.copied == {"2.weight": "2.weight", "2.bias": "2.bias"} and not found.blocks


def unet(**options) -> UNet2DConditionModel:
    return seeded(
        lambda: UNet2DConditionModel(
            **{
                "sample_size": 8, "block_out_channels": (8, 16, 16), "norm_num_groups": 4, "cross_attention_dim": 16,
                "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
                "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2, "layers_per_block": 2,
                "transformer_layers_per_block": (1, 3, 1), **options,
            }
        )
    )  # fmt: skip


def config(network, **changes):
    return {**{name: each for name, each in network.config.items() if name != "_use_default_values"}, **changes}


def test_a_u_net_loses_the_layers_that_bk_sdm_removes():
    """The second of two on the way down, and the second of three on the way up."""
    large = unet()
    small = smaller(large, config(large, layers_per_block=1), 0, "x")
    found = inheritance(small, large)
    assert found.blocks == {
        **{f"down_blocks.{i}.resnets": [0] for i in range(3)}, **{f"up_blocks.{i}.resnets": [0, 2] for i in range(3)},
        **{f"down_blocks.{i}.attentions": [0] for i in range(2)},
        **{f"up_blocks.{i}.attentions": [0, 2] for i in (1, 2)},
    }  # fmt: skip
    ours, theirs = small.state_dict(), large.state_dict()
    assert found.copied.keys() == ours.keys(), "all layers fit"
    for name, origin in found.copied.items():
        assert torch.equal(ours[name], theirs[origin])
    assert found.copied["up_blocks.1.resnets.1.conv1.weight"] == "up_blocks.1.resnets.2.conv1.weight"


def test_a_u_net_loses_its_deepest_levels():
    large = unet()
    levels = {"block_out_channels": (8, 16), "transformer_layers_per_block": (1, 2)}
    blocks = {"down_block_types": large.config.down_block_types[:2], "up_block_types": large.config.up_block_types[1:]}
    found = inheritance(smaller(large, config(large, **levels, **blocks), 0, "x"), large)
    assert (found.blocks["down_blocks"], found.blocks["up_blocks"]) == ([0, 1], [1, 2])
    assert found.blocks["down_blocks.1.attentions.0.transformer_blocks"] == [0, 2]
    assert found.copied["up_blocks.0.resnets.1.conv1.weight"] == "up_blocks.1.resnets.1.conv1.weight"
    assert found.copied["down_blocks.1.resnets.0.conv1.weight"] == "down_blocks.1.resnets.0.conv1.weight"


def test_blocks_of_sd_3_5_keep_their_second_attention(tmp_path):
    options = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 5, "attention_head_dim": 8,
        "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 32, "pooled_projection_dim": 24,
        "pos_embed_max_size": 6, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1, 2),
    }  # fmt: skip
    large = seeded(lambda: SD3Transformer2DModel(**options))
    changed = sd3.ARCHITECTURE.resized(config(large), {"num_layers": 3})
    assert changed["dual_attention_layers"] == (0, 1), "they start from 0, 2, 4"
    found = inheritance(smaller(large, changed, 0, "x"), large)
    assert found.copied.keys() == SD3Transformer2DModel(**{**options, **changed}).state_dict().keys()
    narrow = sd3.ARCHITECTURE.resized(config(large), {"num_attention_heads": 1})
    assert narrow["caption_projection_dim"] == 8 and narrow["dual_attention_layers"] == (0, 1, 2)


def test_pixels(tmp_path):
    """A UNet2DModel of a VP schedule: its students are networks of the linear path."""
    folder = checkpoints.write(tmp_path / "unet", checkpoints.unet(11), DDPMScheduler())
    given = teacher_on_linear_path(checkpoints.load(folder, null_class=10))
    small = of(given, block_out_channels=[8, 8])
    assert type(small.network) is VelocityUNet2DModel and small.network.config.path == "vp"
    assert torch.equal(small.network.conv_in.weight, given.network.conv_in.weight)
    assert small.network.down_blocks[1].resnets[0].conv1.weight.shape == (8, 8, 3, 3)
    found = small(checkpoints.noise(), T, {"class_labels": torch.tensor([0, 1, 10])})
    assert found.shape == (3, 1, 8, 8)


def test_networks_of_edm():
    """The first and the last of three blocks on the way up; the frequencies that are stored are the teacher's."""
    large = seeded(
        lambda: SongUNet2DModel(
            sample_size=16, base_channels=8, channel_multipliers=(1, 2), layers_per_block=2, attention_sizes=(8,),
            num_classes=3, time_embedding_type="fourier", encoder_type="residual", filter_taps=(1, 3, 3, 1),
        )
    )  # fmt: skip
    large.frequencies.copy_(normal(4))
    field = EdmField(large, 0.5, 1, (0.002 / 1.002, 80 / 81))
    given = teacher_on_linear_path(LoadedTeacher(field, (3, 16, 16), 3, None, "", "a teacher", large))
    found = students.describe(given, {"layers_per_block": 1})
    assert found.blocks == {
        f"network.{way}_blocks.{i}.blocks": [0, 2] if way == "up" else [0] for way in ("down", "up") for i in (0, 1)
    }
    student = of(given, layers_per_block=1)
    assert type(student.network) is VelocityEdmUNet2DModel
    own = student.network.network
    assert torch.equal(own.frequencies, large.frequencies)
    assert torch.equal(own.up_blocks[1].blocks[1].conv_in.weight, large.up_blocks[1].blocks[2].conv_in.weight)
    assert student(normal(3, 3, 16, 16), T, {"class_labels": torch.tensor([0, 1, 2])}).shape == (3, 3, 16, 16)
    with pytest.raises(InputError, match="student.config.base_channels: must be as in the teacher"):
        students.check(given, {"base_channels": 4})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"num_layer": 2},
            "num_layer: the config of DiTTransformer2DModel has no such option; did you mean 'num_layers'? valid: "
            "attention_head_dim, num_attention_heads, num_layers",
        ),
        (
            {"in_channels": 8},
            "in_channels: must be as in the teacher, because it is not an option of the size of a "
            "DiTTransformer2DModel, or follows from those that are; valid: attention_head_dim, num_attention_heads, "
            "num_layers",
        ),
        ({"num_layers": 5}, "num_layers: 5 is also the value of DiTTransformer2DModel from dit, so it has no effect; "
         "leave it out"),
        ({"num_layers": "two"}, " num_layers='two'; valid: a valid integer"),
        ({"num_layers": None}, "num_layers: null given; leave it out, to keep the value of the teacher"),
        ({"num_layers": 0}, " the network would have no blocks; give at least one"),
        ({"attention_head_dim": 3}, " no network can be built from student.config: embed_dim must be divisible by 2"),
        ({"num_layers": 1000}, " num_layers=1000; valid: less than or equal to 256"),
    ],
)  # fmt: skip
def test_what_is_refused(teacher, changes, said):
    with pytest.raises(InputError) as error:
        students.check(teacher, changes)
    text = str(error.value)
    expected = f"student.config{':' if said.startswith(' ') else '.'}{said}"
    assert text == (said.strip() if "can be built" in said else expected)


def test_networks_that_cannot_be_called_are_refused(tmp_path):
    place = tiny.TINY["cogview4"].write(tmp_path)
    given = load_teacher(CheckpointTeacher(**place), CPU)
    with pytest.raises(
        InputError, match=r"student.config: the network cannot be called with a sample of shape \[4, 16"
    ):
        students.check(given, {"attention_head_dim": 6})


def test_a_flow_map_is_no_origin(teacher):
    made = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher).flow_map()
    origin = building.untrained(made, StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher))
    with pytest.raises(InputError, match="no smaller student can be made of a student, because it is a flow map"):
        students.check(origin, {"num_layers": 2})


def test_it_is_described(teacher):
    found = students.describe(teacher, {"num_layers": 2})
    assert found.words == (
        "19,952 parameters (teacher: 47,840), 19,952 of them with its weights; transformer_blocks from its 0, 4"
    )


CHANGES = {  # of each class: another width, and another depth or another part of the width
    "sd": [{"block_out_channels": [4, 8]}, {"layers_per_block": 2}],
    "flux": [{"num_attention_heads": 1}, {"num_single_layers": 2}],
    "flux2": [{"num_attention_heads": 1}, {"num_layers": 2, "mlp_ratio": 2.0}],
    "flux2 klein": [{"num_attention_heads": 1}, {"num_single_layers": 2}],
    "chroma": [{"num_attention_heads": 1}, {"approximator_hidden_dim": 16}],
    "aura flow": [{"num_attention_heads": 1}, {"num_single_dit_layers": 2}],
    "hunyuan dit": [{"num_attention_heads": 1}, {"num_layers": 2}],
    "lumina2": [{"num_attention_heads": 1}, {"num_layers": 1}],
    "sana": [{"num_attention_heads": 1, "num_cross_attention_heads": 1}, {"num_layers": 1}],
    "wan": [{"num_attention_heads": 1}, {"ffn_dim": 12}],
    "wan 2.2": [{"num_attention_heads": 1}, {"ffn_dim": 12}],
    "z image": [{"n_heads": 1}, {"n_layers": 1}],
}
LAYERS = [{"num_attention_heads": 1}, {"num_layers": 1}]  # of the other classes
ALL = [(name, changes) for name in tiny.TINY for changes in CHANGES.get(name.removesuffix("xl"), LAYERS)]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "changes"), ALL)
def test_every_class_is_trained_and_read_again(tmp_path, name, changes):
    """Students of each kind, with gradients in all weights, and bit for bit the same from their folder."""
    place = CheckpointTeacher(**tiny.TINY[name].write(tmp_path))
    given = teacher_on_linear_path(load_teacher(place, CPU))
    init = StudentInit(given, None, given.shape, given.num_classes, 0, given, changes=changes)
    x, cond, s = normal(3, *given.shape), conditions(given, 3), T / 2
    kinds = {"velocity": (init.velocity_field, "euler", ()), "flow_map": (init.flow_map, "jump", (s,))}
    kinds["acceleration"] = (init.acceleration, "accelerated", (normal(*x.shape, seed=9),))
    for kind, (make, sampler, more) in kinds.items():
        student = make()
        student(x, T, *more, cond).square().sum().backward()
        missed = [key for key, each in student.named_parameters() if each.requires_grad and each.grad is None]
        assert all(key.startswith("network.velocity.") for key in missed), missed
        card = StudentCard(
            name="s", recipe="reflow/reflow", spec_digest="", teacher_digest=given.digest, kind=kind, sampler=sampler,
            num_classes=None, null_class=None, shape=given.shape, weights="raw", images=1,
        )  # fmt: skip
        export(student, tmp_path / kind, card, init.packaging)
        read = load_student(tmp_path / kind, CPU, place).student
        assert all(torch.equal(each, read.state_dict()[key]) for key, each in student.state_dict().items())
        with torch.no_grad():  # layers of few channels are rounded in another way at other addresses of memory
            expected = student.eval()(x, T, *more, cond)
            assert (read(x, T, *more, cond) - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max())
        assert sum(each.numel() for each in read.parameters()) != sum(
            each.numel() for each in given.network.parameters()
        )
