"""EDM's checkpoints: `distill convert` makes them teachers that compute the same."""

import json
import pickle

import edm
import pytest
import torch
from checkpoints import load
from commands import command, snapshot
from safetensors.torch import load_file
from test_convert import FILE, Evil, asked

from distill.convert import conversion
from distill.core.errors import InputError
from distill.exchange.student_card import StudentCard
from distill.execution import inspecting
from distill.networks.edm_unet import DhariwalUNet2DModel, SongUNet2DModel
from distill.spec.model import CheckpointTeacher
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.loaded import load_student

SIZES = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 16, "num_blocks": 1}
DDPM = SIZES | {
    "channel_mult": [1, 2],
    "attn_resolutions": [4],
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
    "augment_dim": 9,
    "dropout": 0.13,
}
NCSN = DDPM | {
    "img_resolution": 16,
    "channel_mult": [2, 1, 2],
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
    "label_dim": 10,
}
ADM = SIZES | {"model_channels": 64, "channel_mult": [1, 2], "attn_resolutions": [4], "label_dim": 10}
NETWORKS = {
    "DDPM++": (DDPM, "SongUNet"),
    "NCSN++": (NCSN, "SongUNet"),
    "ADM": (ADM, "DhariwalUNet"),
    "ADM without classes": (ADM | {"label_dim": 0, "attn_resolutions": [8, 4]}, "DhariwalUNet"),
}


def costs(name):
    kind = "Dhariwal" if "ADM" in name else "Song"
    return pytest.param(name, marks=pytest.mark.costs(f"teacher {kind}UNet2DModel"))


def pickled(path, name="DDPM++", *, mark=None, **changes):
    """A checkpoint of one of the networks; returns its weights by EDM's names, and their options."""
    options, model = NETWORKS[name]
    weights = edm.tree(options, song=model == "SongUNet")
    edm.write(path, weights, options, mark or path.with_name("mark"), **{"model": model, **changes})
    return weights, options


def converted(file, folder):
    """What the command does, without a process of its own."""
    assert asked(folder, file)[0] == 0
    return conversion.complete(file, None, folder)


@pytest.mark.parametrize("name", list(map(costs, NETWORKS)))
@torch.no_grad()
def test_the_velocity_is_that_of_the_network(tmp_path, name):
    weights, options = pickled(tmp_path / "x.pkl", name)
    song = NETWORKS[name][1] == "SongUNet"
    done = converted(tmp_path / "x.pkl", tmp_path / "new")
    assert not (tmp_path / "mark").exists(), "the source code in the file was run"
    assert done == conversion.Converted(f"{'Song' if song else 'Dhariwal'}UNet2DModel", "ema", ["ema"], True)
    teacher = load(tmp_path / "new")
    count, side = options.get("label_dim") or None, options["img_resolution"]
    assert (teacher.shape, teacher.num_classes, teacher.null_class) == ((3, side, side), count, None)
    assert teacher.field.t_range == pytest.approx((0.002 / 1.002, 80 / 81))
    sigma = torch.tensor([0.01, 0.5, 3.0, 60.0])
    x = sigma[:, None, None, None] * torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 3, 9, 3])
    classes = None if count is None else torch.nn.functional.one_hot(labels, count).float()
    expected = edm.velocity(weights, options, x, sigma, classes, song=song)
    found = teacher.field(x, sigma / (1 + sigma), {} if count is None else {"class_labels": labels})
    assert ((found - expected).flatten(1).norm(dim=1) <= 1e-5 * expected.flatten(1).norm(dim=1)).all()
    assert 0.1 < edm.network(weights, options, x, sigma, classes, song=song).std() < 10


@pytest.mark.costs("teacher SongUNet2DModel")
def test_weights_are_the_same_bits_under_other_names(tmp_path):
    weights, _ = pickled(tmp_path / "x.pkl", "NCSN++")
    converted(tmp_path / "x.pkl", tmp_path / "new")
    written = load_file(tmp_path / "new" / FILE)
    for ours, theirs in {
        "frequencies": weights["map_noise"]["freqs"],
        "class_embedding.weight": weights["map_label"]["weight"],
        "conv_in.weight": weights["enc"]["16x16_conv"]["weight"],
        "down_blocks.1.image.conv.bias": weights["enc"]["8x8_aux_residual"]["bias"],
        "down_blocks.2.change.skip.weight": weights["enc"]["4x4_down"]["skip"]["weight"],
        "mid_block.blocks.0.attention.qkv.weight": weights["dec"]["4x4_in0"]["qkv"]["weight"],
        "up_blocks.2.blocks.1.norm_in.weight": weights["dec"]["16x16_block1"]["norm0"]["weight"],
        "conv_out.bias": weights["dec"]["16x16_aux_conv"]["bias"],
    }.items():
        assert torch.equal(written[ours], theirs), ours
    files = snapshot(tmp_path / "new")
    assert set(files) == {"config.json", FILE, "scheduler", "scheduler/scheduler_config.json"}
    assert json.loads(files["scheduler/scheduler_config.json"]) == {
        "_class_name": "EDMEulerScheduler",
        "prediction_type": "epsilon",
        "sigma_data": 0.5,
        "sigma_max": 80.0,
        "sigma_min": 0.002,
    }


@pytest.mark.costs("teacher SongUNet2DModel")
@torch.no_grad()
def test_the_null_class_is_no_class(tmp_path):
    weights, options = pickled(tmp_path / "x.pkl", "NCSN++")
    converted(tmp_path / "x.pkl", tmp_path / "new")
    teacher = load(tmp_path / "new", null_class=10)
    x, sigma = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, 3.0])
    expected = edm.velocity(weights, options, x, sigma, torch.zeros(2, 10), song=True)
    found = teacher.guided(0.0)(x, sigma / (1 + sigma), {"class_labels": torch.tensor([1, 2])})
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    told = inspecting.inspect(CheckpointTeacher(path=str(tmp_path / "new"))).to_set["null_class"]
    assert told.endswith("if the network has one; valid: 10, which stands for none of its classes 0 to 9")
    with pytest.raises(InputError, match=r"teacher.null_class=3: .* has 10 classes, valid: 10"):
        load(tmp_path / "new", null_class=3)


@pytest.mark.costs("teacher SongUNet2DModel")
@torch.no_grad()
def test_the_frequencies_of_the_time_stay_in_float32(tmp_path):
    pickled(tmp_path / "x.pkl", "NCSN++")
    converted(tmp_path / "x.pkl", tmp_path / "new")
    whole, half = load(tmp_path / "new"), load(tmp_path / "new", dtype="bfloat16")
    assert (half.network.frequencies.dtype, half.network.conv_in.weight.dtype) == (torch.float32, torch.bfloat16)
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 0.9])
    expected, found = (each.field(x, t, {"class_labels": torch.tensor([1, 2])}) for each in (whole, half))
    assert (found - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.costs("teacher DhariwalUNet2DModel")
@torch.no_grad()
def test_on_the_linear_path_it_is_finite_at_both_ends(tmp_path):
    pickled(tmp_path / "x.pkl", "ADM")
    converted(tmp_path / "x.pkl", tmp_path / "new")
    native = load(tmp_path / "new")
    teacher = teacher_on_linear_path(native)
    x, t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 0.5, 1.0])
    cond = {"class_labels": torch.tensor([1, 2, 3])}
    found = teacher.field(x, t, cond)
    assert found.isfinite().all()
    # At t = 0.5, sigma = 1 and the sample of the native path is x / (1 - t); v = noise - data.
    slope = native.field(x / 0.5, torch.full((3,), 0.5), cond) * 0.25  # the noise: d sigma / dt is 4
    torch.testing.assert_close(found[1], (slope - (x / 0.5 - slope))[1], rtol=1e-4, atol=1e-4)
    inside, outside = teacher.features(x, t, cond, ["down_blocks.1", "up_blocks.0"])
    assert inside.shape == outside.shape == (3, 128, 4, 4)


@pytest.mark.long
@torch.no_grad()
@pytest.mark.parametrize("name", ["NCSN++", "ADM"])
def test_students_start_as_the_teacher_and_load_in_diffusers(tmp_path, name):
    """And what they learn of the second time is stored, too."""
    pickled(tmp_path / "x.pkl", name)
    converted(tmp_path / "x.pkl", tmp_path / "new")
    teacher = teacher_on_linear_path(load(tmp_path / "new"))
    init = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher, dropout=0.25)
    x, t = torch.randn(3, *teacher.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.6, 1.0])
    cond, s = {"class_labels": torch.tensor([1, 9, 10])}, torch.tensor([0.1, 0.0, 0.5])
    expected = teacher.field(x, t, cond)
    student, flow_map, critic = init.velocity_field().eval(), init.flow_map().eval(), init.critic().eval()
    assert student.network.config["dropout"] == 0.25
    assert torch.equal(student(x, t, cond), expected) and torch.equal(critic(x, t, cond)[0], expected)
    assert torch.equal(flow_map(x, t, s, cond), expected)
    with pytest.raises(InputError, match="a network of EDM cannot get an acceleration; use a recipe with another kind"):
        init.acceleration()
    flow_map.network.gap[2].weight.normal_(generator=torch.Generator().manual_seed(2))
    assert not torch.equal(flow_map(x, t, s, cond), expected)
    for kind, made, sampler in (("velocity", student, "euler"), ("flow_map", flow_map, "jump")):
        card = StudentCard(
            name="s", recipe="r", summary="x", spec_digest="0" * 64, teacher_digest=teacher.digest, teacher="edm",
            data="", license="", kind=kind, sampler=sampler, shape=teacher.shape, num_classes=10, null_class=None,
            guidance_scale=1.0, weights="raw", images=1,
        )  # fmt: skip
        export(made, tmp_path / kind, card)  # compares with plain diffusers
        again = load_student(tmp_path / kind, torch.device("cpu")).student
        given = (x, t, cond) if kind == "velocity" else (x, t, s, cond)
        assert torch.equal(again(*given), made(*given))


def test_the_published_networks_have_the_published_sizes():
    """In millions of parameters: for CIFAR-10, for faces of 64x64 pixels, and for ImageNet of 64x64 pixels."""
    with torch.device("meta"):
        cifar = SongUNet2DModel(32, channel_multipliers=[2, 2, 2])
        faces = SongUNet2DModel(64, channel_multipliers=[1, 2, 2, 2])
        imagenet = DhariwalUNet2DModel(64, num_classes=1000)
    sizes = [sum(each.numel() for each in network.parameters()) for network in (cifar, faces, imagenet)]
    assert [round(size / 1e6, 1) for size in sizes] == [55.7, 61.8, 295.9]


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"wrapper": "VPPrecond"},
            "its network is a VPPrecond, the baseline with a variance preserving schedule, which",
        ),
        (
            {"wrapper": "Precond"},
            "its network is a Precond, the network of EDM2, which is not supported; valid: EDMPrecond",
        ),
        ({"model": "UNet"}, "its network is a UNet, which is not supported; valid: SongUNet, DhariwalUNet"),
        ({"encoder_type": "skip"}, "encoder_type='skip'; valid: 'standard' or 'residual'"),
        ({"decoder_type": "skip"}, "decoder_type='skip'; valid: 'standard'"),
        ({"model_channels": None}, "base_channels=None; valid: a valid integer"),
        ({"img_resolution": 9}, "sample_size=9 cannot be halved between each of 2 channel_multipliers"),
        ({"more": 1}, "its network was made with arguments that are not known (more); valid: img_resolution, "),
        ({"num_blocks": 2}, "config.json and the weights do not match: missing weights: "),
        ({"label_dim": 4}, "config.json and the weights do not match: missing weights: class_embedding."),
    ],
)
def test_other_networks_are_refused(tmp_path, changes, message):
    file, weights = tmp_path / "x.pkl", edm.tree(DDPM, song=True)
    names = {key: changes[key] for key in ("wrapper", "model") if key in changes}
    options = DDPM | {key: value for key, value in changes.items() if key not in names}
    edm.write(file, weights, options, tmp_path / "mark", **names)
    assert asked(tmp_path / "out", file)[0] == 0
    with pytest.raises(InputError) as error:
        conversion.complete(file, None, tmp_path / "out")
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_any_protocol_of_pickle_is_read(tmp_path, protocol):
    pickled(tmp_path / "x.pkl", protocol=protocol)
    code, facts = asked(tmp_path / "out", tmp_path / "x.pkl")
    assert (code, facts["found"], facts["module"]["class_name"]) == (0, ["ema"], "EDMPrecond")
    assert facts["module"]["modules"]["model"]["options"] == DDPM


@pytest.mark.long
@pytest.mark.process
def test_the_command_converts_one_and_refuses_a_harmful_one(capfd, tmp_path):
    file, new = tmp_path / "x.pkl", tmp_path / "new"
    pickled(file)
    done = command(capfd, "convert", str(file), str(new))
    assert (done.code, done.out, done.err) == (0, f"converted 'ema' of {file} to {new}: SongUNet2DModel\n", "")
    assert load(new).shape == (3, 8, 8)
    file.write_bytes(pickle.dumps({"ema": Evil(tmp_path / "mark")}))
    before = snapshot(tmp_path)
    done = command(capfd, "convert", str(file), str(tmp_path / "other"))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {file}: it refers to posix.system")
    assert snapshot(tmp_path) == before


def test_a_plain_pickle_of_another_network_needs_a_config(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"w": torch.ones(2)}))
    assert asked(tmp_path / "out", tmp_path / "x.pkl")[0] == 0
    with pytest.raises(InputError, match="is not beside it; give the folder that contains it with --config"):
        conversion.complete(tmp_path / "x.pkl", None, tmp_path / "out")
    pickled(tmp_path / "y.pkl")
    assert asked(tmp_path / "out", tmp_path / "y.pkl")[0] == 0
    with pytest.raises(InputError, match="--config .* has no effect: .*y.pkl describes its network itself; remove it"):
        conversion.complete(tmp_path / "y.pkl", tmp_path, tmp_path / "out")
