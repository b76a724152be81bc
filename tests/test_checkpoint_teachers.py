"""Teachers from checkpoints: the Euler solver on the grid of a scheduler gives the images of that scheduler, and a
network that predicts exactly gives the exact velocity.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from checkpoints import STEPS, edit, load, noise, ours, refused, same, stock, unet, vp_grid, write
from choices import few
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
)
from safetensors.torch import load_file, save_file
from torch import nn

from distill.core.errors import InputError
from distill.flow.fields import Rescheduled
from distill.flow.interpolants import linear, vp
from distill.flow.solvers import integrate
from distill.networks.velocity_mlp import VelocityMLP
from distill.networks.velocity_unet import VelocityUNet2DModel
from distill.students.init import StudentInit
from distill.teachers.analytic import GaussianField, MixtureField
from distill.teachers.network_field import EdmField, NetworkField


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small run tenfold slower on threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the same images as the stock scheduler ---

of_class = pytest.mark.costs("teacher UNet2DModel")
classes_or_none = pytest.mark.parametrize("classes", [pytest.param(None, marks=pytest.mark.long), 4])


@of_class
@classes_or_none
@pytest.mark.parametrize("prediction", few(["epsilon", "sample", "v_prediction"], "v_prediction"))
def test_ddim(tmp_path, prediction, classes):
    # A random network predicts no noise at all, so alpha = 0.006 of the default betas would make its images hundreds
    # large; Stable Diffusion's betas (0.07) keep them at tens.
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = DDIMScheduler(
        prediction_type=prediction,
        clip_sample=False,
        timestep_spacing="trailing",
        **(betas if prediction == "epsilon" else {}),
    )
    network = unet(classes)
    teacher = load(write(tmp_path, network, scheduler))
    scheduler.set_timesteps(STEPS)
    labels = None if classes is None else torch.tensor([0, 3, 1])
    same(ours(teacher, vp_grid(scheduler), labels), stock(network, scheduler, noise(), labels))


@of_class
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddpm_config(tmp_path, spacing):
    scheduler = DDPMScheduler(
        prediction_type="v_prediction",
        beta_schedule="squaredcos_cap_v2",  # alpha at the end is 5e-5
        clip_sample=False,
        timestep_spacing=spacing,
    )
    network = unet()
    teacher = load(write(tmp_path, network, scheduler))
    stepper = DDIMScheduler.from_config(scheduler.config)
    stepper.set_timesteps(STEPS)
    same(ours(teacher, vp_grid(stepper)), stock(network, stepper, noise()))


@of_class
@pytest.mark.parametrize("prediction", ["sample", pytest.param("v_prediction", marks=pytest.mark.long)])
def test_zero_terminal_snr(tmp_path, prediction):
    scheduler = DDIMScheduler(
        prediction_type=prediction, rescale_betas_zero_snr=True, clip_sample=False, timestep_spacing="trailing"
    )
    network = unet()
    teacher = load(write(tmp_path, network, scheduler))
    scheduler.set_timesteps(STEPS)
    grid = vp_grid(scheduler)
    assert grid[0] == 1
    grid[0] = Rescheduled(teacher.field, linear()).t_range[1]  # 1 - 1e-6: at alpha = 0 the table's time is infinite
    same(ours(teacher, grid), stock(network, scheduler, noise()))


@of_class
@classes_or_none
@pytest.mark.parametrize(
    "scheduler", [FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)], ids=["1", "shift=3"]
)
def test_flow_match_euler(tmp_path, scheduler, classes):
    network = unet(classes)
    teacher = load(write(tmp_path, network, scheduler))
    scheduler.set_timesteps(STEPS)
    labels = None if classes is None else torch.tensor([0, 3, 1])
    same(ours(teacher, scheduler.sigmas.double(), labels), stock(network, scheduler, noise(), labels))


@of_class
def test_flow_map_euler(tmp_path):
    network, scheduler = unet(), FlowMapEulerDiscreteScheduler(shift=2.0)
    teacher = load(write(tmp_path, network, scheduler))
    scheduler.set_timesteps(STEPS)
    expected = noise()
    for timestep, t, t_next in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False):
        with torch.no_grad():
            expected = expected + (t_next - t).item() * network(expected, timestep).sample
    same(ours(teacher, scheduler.sigmas), expected)


@of_class
@classes_or_none
@pytest.mark.parametrize("prediction", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.long)])
def test_edm_euler(tmp_path, prediction, classes):
    network, scheduler = unet(classes), EDMEulerScheduler(prediction_type=prediction, sigma_data=0.7)
    teacher = load(write(tmp_path, network, scheduler))
    scheduler.set_timesteps(STEPS)
    labels = None if classes is None else torch.tensor([0, 3, 1])
    sigmas = scheduler.sigmas.double()
    expected = stock(network, scheduler, scheduler.init_noise_sigma * noise(), labels)
    same(ours(teacher, sigmas / (1 + sigmas), labels), expected)
    assert teacher.field.t_range == pytest.approx((0.002 / 1.002, 80 / 81))


# --- a network that carries the oracle's exact prediction ---

N = 1000
MEAN, STD = torch.tensor([0.3, -0.8], dtype=torch.float64), torch.tensor([0.5, 1.2], dtype=torch.float64)
MEANS = torch.tensor([[1.0, 0.0], [-0.5, 2.0], [0.0, -1.0]], dtype=torch.float64)


def gaussian_data(x, alpha, sigma):
    """E[data | x = alpha data + sigma noise] for data N(MEAN, STD^2)."""
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)


def mixture_data(x, alpha, sigma):
    """The same for equal parts N(MEANS[k], 0.3^2)."""
    variance = alpha**2 * 0.09 + sigma**2  # [B, 1]
    offset = x[:, None] - alpha[:, None] * MEANS  # [B, K, 2]
    part = torch.softmax(-offset.square().sum(2) / (2 * variance), dim=1)[..., None]
    return (part * (MEANS + (alpha * 0.09 / variance)[:, None] * offset)).sum(1)


ORACLES = {"gaussian": (GaussianField(MEAN, STD), gaussian_data), "mixture": (MixtureField(MEANS, 0.3), mixture_data)}


class Stub(nn.Module):
    """The exact prediction of a kind, from (alpha, sigma) of a timestep and the scale of the network's input."""

    def __init__(self, kind, data_of, coefficients):
        super().__init__()
        self.kind, self.data_of, self.coefficients = kind, data_of, coefficients

    def forward(self, sample, timestep, class_labels=None):
        alpha, sigma, scale = (c[:, None] for c in self.coefficients(timestep))
        x = sample / scale
        data = self.data_of(x, alpha, sigma)
        eps = (x - alpha * data) / sigma
        edm_norm = (sigma**2 + 0.25) ** 0.5
        out = {
            "sample": data,
            "epsilon": eps,
            "v_prediction": alpha * eps - sigma * data,
            "velocity": eps - data,
            "edm": (data - 0.25 / edm_norm**2 * x) / (sigma * 0.5 / edm_norm),
        }[self.kind]
        return SimpleNamespace(sample=out)


ALPHAS = DDIMScheduler().alphas_cumprod.double()


def vp_coefficients(n):
    assert torch.equal(n.round(), n) or (n.round() - n).abs().max() < 1e-9, "called between the steps of the table"
    alphas = ALPHAS[n.round().long()]
    return alphas.sqrt(), (1 - alphas).sqrt(), torch.ones_like(alphas)


def linear_coefficients(timestep):
    return 1 - timestep / 1000, timestep / 1000, torch.ones_like(timestep)


def edm_coefficients(c_noise):
    sigma = torch.exp(4 * c_noise)
    return torch.ones_like(sigma), sigma, (sigma**2 + 0.25) ** -0.5


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "velocity", "edm"])
def test_a_stub_gives_back_the_velocity_of_its_oracle(kind, oracle):
    exact, data_of = ORACLES[oracle]
    if kind == "velocity":
        t = torch.tensor([0.01, 0.3, 0.5, 0.999, 1.0], dtype=torch.float64)
        field = NetworkField(Stub(kind, data_of, linear_coefficients), linear(), "velocity", 1000.0)
    elif kind == "edm":
        sigma = torch.tensor([0.002, 0.1, 1.0, 7.0, 80.0], dtype=torch.float64)
        t = sigma / (1 + sigma)
        field = EdmField(Stub(kind, data_of, edm_coefficients), 0.5, 1, (0.002 / 1.002, 80 / 81))
    else:
        alpha, sigma, _ = vp_coefficients(torch.tensor([0, 10, 400, 800, 999]))
        t = sigma / (alpha + sigma)
        field = NetworkField(Stub(kind, data_of, vp_coefficients), vp(ALPHAS), kind, N - 1.0)
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # the field as loaded, asked on the linear path, where the oracle was written down
    v = field(x, t, {}) if kind == "velocity" else Rescheduled(field, linear())(x, t, {})
    assert (v - exact(x, t, {})).abs().max() <= 1e-6
    for t_bad in (t[:1], t[:, None], t[0]):
        with pytest.raises(ValueError, match="a time must have shape"):
            field(x, t_bad, {})


# --- guidance ---


@of_class
def test_guidance_is_the_usual_loop_and_scale_one_is_none(tmp_path):
    network, scheduler = unet(5), FlowMatchEulerDiscreteScheduler()
    teacher = load(write(tmp_path, network, scheduler), null_class=4)
    assert (teacher.num_classes, teacher.null_class) == (4, 4)
    scheduler.set_timesteps(STEPS)
    labels, null, scale = torch.tensor([0, 3, 1]), torch.full((3,), 4), 2.5
    expected = noise()
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            uncond = network(expected, timestep, class_labels=null).sample
            cond = network(expected, timestep, class_labels=labels).sample
            expected = scheduler.step(uncond + scale * (cond - uncond), timestep, expected).prev_sample
        got = integrate("euler", teacher.guided(scale), noise(), scheduler.sigmas.double(), {"class_labels": labels})
        same(got, expected)
        t = torch.tensor([0.2, 0.5, 0.9])
        unguided = teacher.field(noise(), t, {"class_labels": labels})
        assert torch.equal(teacher.guided(1.0)(noise(), t, {"class_labels": labels}), unguided)


def test_guidance_without_a_null_class_and_a_call_without_labels_are_refused(tmp_path):
    teacher = load(write(tmp_path, unet(5), FlowMatchEulerDiscreteScheduler()))
    assert (teacher.num_classes, teacher.null_class) == (5, None)
    with pytest.raises(
        InputError,
        match=r"has no class id for the unconditional call, which guidance needs; use guidance_scale: 1, .* "
        r"teacher\.null_class",
    ):
        teacher.guided(2.0)
    with pytest.raises(ValueError, match="class_labels should be provided"):
        teacher.field(noise(), torch.full((3,), 0.5), {})


# --- what is loaded ---


def test_network_is_frozen_in_evaluation_mode_and_float32(tmp_path):
    network = unet().half()
    teacher = load(write(tmp_path, network, DDIMScheduler()))
    assert not teacher.network.training
    assert teacher.shape == (1, 8, 8)
    assert teacher.description == f"UNet2DModel from {tmp_path.name}"
    for name, weight in teacher.network.named_parameters():
        assert weight.dtype == torch.float32 and not weight.requires_grad
        assert torch.equal(weight.half(), network.state_dict()[name])


def test_the_same_checkpoint_in_any_form_is_the_same_teacher(tmp_path):
    pipeline = write(tmp_path / "pipeline", unet(), DDIMScheduler())
    lone = tmp_path / "lone"
    unet().save_pretrained(lone)
    digests = {
        load(pipeline).digest,
        load(pipeline / "unet").digest,  # scheduler beside it
        load(lone, scheduler=str(pipeline / "scheduler")).digest,
    }
    assert len(digests) == 1
    assert load(pipeline, prediction="v_prediction").digest not in digests
    assert load(lone, prediction="velocity").field.interpolant.name == "linear"
    unet(seed=1).save_pretrained(lone)
    assert load(lone, scheduler=str(pipeline / "scheduler")).digest not in digests
    DDIMScheduler(beta_end=0.01).save_pretrained(pipeline / "scheduler")
    assert load(pipeline).digest not in digests


def test_shards_and_old_attention_names_are_read(tmp_path):
    network = unet()
    network.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    network.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = load_file(file)
    for new_name, old_name in names.items():
        old = {k.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}."): v for k, v in old.items()}
    assert any("query" in k for k in old)
    save_file(old, file, {"format": "pt"})
    for folder in ("shards", "old"):
        loaded = load(tmp_path / folder, prediction="velocity").network.state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in network.state_dict().items())


def test_student_folders_are_checkpoints_and_their_code_is_not_run(tmp_path):
    network = VelocityMLP(dim=2, width=8, depth=1, num_class_embeds=4)
    network.save_pretrained(tmp_path / "unet")
    (tmp_path / "unet" / "velocity_mlp.py").write_text("raise RuntimeError('code of a folder was run')")
    (tmp_path / "pipeline.py").write_text("raise RuntimeError('code of a folder was run')")
    FlowMapEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    index = {
        "_class_name": ["pipeline", "DistilledPipeline"],
        "unet": ["velocity_mlp", "VelocityMLP"],
        "scheduler": ["diffusers", "FlowMapEulerDiscreteScheduler"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "distill.json").write_text(json.dumps({"kind": "velocity", "null_class": 3, "num_classes": 3}))
    teacher = load(tmp_path)
    assert (teacher.shape, teacher.num_classes, teacher.null_class) == ((2,), 3, 3)
    x, t, labels = torch.randn(4, 2), torch.rand(4), torch.tensor([0, 1, 2, 3])
    assert torch.equal(teacher.field(x, t, {"class_labels": labels}), network(x, 1000 * t, labels).sample)
    (tmp_path / "distill.json").write_text(json.dumps({"kind": "flow_map"}))
    refused(tmp_path, "is a student of kind flow_map; valid teachers: velocity")


def test_a_continued_vp_student_is_a_linear_teacher(tmp_path):
    source = load(write(tmp_path / "teacher", unet(), DDIMScheduler(prediction_type="v_prediction")))
    student = StudentInit(source, None, source.shape, None, 0).velocity_field().eval()
    assert str(tmp_path) not in json.dumps({k: str(v) for k, v in student.network.config.items()})
    loaded = load(write(tmp_path / "student", student.network, FlowMapEulerDiscreteScheduler()))
    assert isinstance(loaded.network, VelocityUNet2DModel)
    assert loaded.field.interpolant.name == "linear"
    x, t = noise(), torch.tensor([0.0, 0.5, 1.0])
    with torch.no_grad():
        assert torch.equal(loaded.field(x, t, {}), student(x, t, {}))


# --- refusals ---


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    folder = write(tmp_path, unet(), DDIMScheduler())
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "unet" / "diffusion_pytorch_model.bin")
    refused(
        folder,
        "has no diffusion_pytorch_model.safetensors, but config.json, diffusion_pytorch_model.bin",
        "only safetensors files are loaded",
        f"convert it: distill convert {folder}/unet/diffusion_pytorch_model.bin NEW_FOLDER",
    )


def test_damaged_weights_are_refused_by_name(tmp_path):
    folder = write(tmp_path, unet(), DDIMScheduler())
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(folder, f"{file} is truncated or damaged", "copy or download it again")
    tensors = {**unet().state_dict()}
    tensors["conv_in.bias"] = torch.full_like(tensors["conv_in.bias"], float("nan"))
    save_file(tensors, file, {"format": "pt"})
    refused(folder, f"{file} contains NaN or infinity in conv_in.bias")
    tensors = unet().state_dict()
    tensors.pop("conv_in.bias")
    save_file(tensors, file, {"format": "pt"})
    refused(folder, "config.json and the weights do not match: missing weights: conv_in.bias")
    save_file({**unet().state_dict(), "stray": torch.zeros(1)}, file, {"format": "pt"})
    refused(folder, "config.json and the weights do not match: unknown weights: stray")
    save_file({**unet().state_dict(), "conv_in.bias": torch.zeros(3)}, file, {"format": "pt"})
    refused(folder, "do not match: conv_in.bias has shape [3] in the weights, but config.json implies [8]")


def test_a_missing_shard_is_refused_by_name(tmp_path):
    unet().save_pretrained(tmp_path, max_shard_size="30KB")
    first = min(tmp_path.glob("*.safetensors"))
    first.unlink()
    refused(tmp_path, f"names {first.name}, which do not exist", prediction="velocity")


def test_what_is_not_supported_says_what_is(tmp_path):
    folder = write(tmp_path, unet(4), DDIMScheduler())
    refused(folder, "teacher.null_class=1: ", "has 4 class embeddings, valid: the last, 3", null_class=1)
    refused(
        folder, "prediction=velocity is not supported for the vp path; valid: epsilon, sample", prediction="velocity"
    )
    refused(folder, "teacher.scheduler=/nowhere has no scheduler_config.json", scheduler="/nowhere")
    IPNDMScheduler().save_pretrained(folder / "scheduler")
    refused(
        folder, "IPNDMScheduler is not supported, because its networks", "valid: DDIMParallelScheduler, DDIMScheduler, "
    )
    DDIMScheduler(rescale_betas_zero_snr=True).save_pretrained(folder / "scheduler")
    refused(
        folder,
        "prediction epsilon does not work with rescale_betas_zero_snr, because it does not determine the data "
        "at zero SNR; valid: sample",
    )
    config = folder / "unet" / "config.json"
    edit(config, class_embed_type="identity")
    refused(folder, "class_embed_type identity is not supported")
    edit(config, class_embed_type=None, sample_size=None)
    refused(folder, "sample_size=None, in_channels=1", prediction="sample")
    edit(config, time_embedding_type="learned")
    refused(folder, "time_embedding_type learned supports only integer timesteps")
    edit(config, _class_name="UNet2DModle")
    refused(folder, "network class UNet2DModle is not supported; did you mean 'UNet2DModel'? valid: ", ", VelocityMLP")
    edit(config, _class_name="UNet2DModel")
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    refused(
        folder,
        "is a pipeline with the components scheduler, unet, vae; valid for a UNet2DModel: pixel-space "
        "pipelines with only scheduler and unet",
    )
    config.write_text("{")
    refused(folder, f"{config} cannot be read as JSON")


def test_classes_are_embeddings(tmp_path):
    folder = write(tmp_path, unet(), DDIMScheduler())
    refused(folder, "teacher.null_class=3, but ", "has no class embeddings; leave it out", null_class=3)
    edit(folder / "unet" / "config.json", class_embed_type="identity")
    refused(folder, "class_embed_type identity is not supported; valid: networks with only num_class_embeds")


def test_paths_that_hold_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    refused(tmp_path, "has neither model_index.json nor config.json, but notes.txt")
    refused(tmp_path / "notes.txt", "is a file; give the folder")
    refused(
        "/nowhere/teacher", "teacher.path=/nowhere/teacher does not exist; give a folder, or a hub id like org/name"
    )
    refused("org/not-there", "is neither a folder here nor a hub id that can be fetched or is cached")
    refused("org/not-there", "teacher.path=org/not-there at revision abc is", revision="abc")
    unet().save_pretrained(tmp_path / "lone")
    refused(
        tmp_path / "lone", "has no scheduler config, so its noise schedule is unknown", "teacher.prediction=velocity"
    )


def test_a_teacher_with_another_time_scale_is_refused_as_a_start(tmp_path):
    source = load(write(tmp_path, unet(), FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)))
    init = StudentInit(source, None, source.shape, None, 0)
    with pytest.raises(
        InputError, match="trained with num_train_timesteps=500, but students .* start from a new `network`"
    ):
        init.velocity_field()


def test_settings_without_effect_are_refused(tmp_path):
    write(tmp_path / "stock", unet(), DDIMScheduler())
    refused(tmp_path / "stock", "teacher.revision=abc has no effect:", "is a folder here, not a hub id", revision="abc")
    VelocityMLP(dim=2, width=4, depth=1).save_pretrained(tmp_path / "mlp")
    said = "is a VelocityMLP, which always predicts the velocity of the linear path; remove it"
    for name, value in (("prediction", "epsilon"), ("scheduler", str(tmp_path / "stock" / "scheduler"))):
        refused(tmp_path / "mlp", f"teacher.{name}={value} has no effect: ", said, **{name: value})
    assert load(tmp_path / "mlp").field.interpolant.name == "linear"


@pytest.mark.parametrize(
    ("head", "known"),
    [
        ("---\nlibrary_name: diffusers\nlicense: cc-by-nc-4.0\ntags:\n- x\n---\n# A\n", "cc-by-nc-4.0"),
        ("---\nlicense: other\nlicense_name: my-terms\n---\n", "my-terms"),
        ("---\nlicense: 'apache-2.0'\n---\n", "apache-2.0"),
        ("---\nlicense: other\n---\n", ""),
        ("# A\n\n---\nlicense: mit\n---\n", ""),
        ('---\nlicense: "x | y [click](http://a)"\n---\n', ""),
        ("", ""),
    ],
)
def test_the_terms_of_a_teacher_are_those_of_its_model_card(tmp_path, head, known):
    write(tmp_path, unet(), DDPMScheduler())
    (tmp_path / "README.md").write_text(head)
    assert load(tmp_path).license == known
