"""Teachers in bfloat16 and float16: the network is that of diffusers in this data type."""

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from latent import conditions, ddim, load, normal, seeded, write, write_conditions
from test_teacher_flux import embeddings as flux_embeddings
from test_teacher_flux import pipeline as flux
from test_teacher_sd3 import embeddings as sd3_embeddings
from test_teacher_sd3 import pipeline as sd3
from test_teacher_unet_condition import SD
from test_teacher_unet_condition import embeddings as sd_embeddings
from test_teacher_unet_condition import pipeline as sd

from distill.flow.fields import Rescheduled
from distill.flow.interpolants import linear
from distill.students.init import StudentInit, teacher_on_linear_path

TEACHERS = {
    "flux": (lambda: flux(guidance_embeds=False), lambda: flux_embeddings(2)),
    "sd3": (sd3, lambda: sd3_embeddings(2)),
    "sd": (lambda: sd(ddim(**SD)), lambda: sd_embeddings(2, xl=False)),
}


@pytest.mark.parametrize(("name", "dtype"), [("flux", "bfloat16"), ("sd3", "float16"), ("sd", "bfloat16")])
def test_the_velocity_is_that_of_the_network_that_diffusers_casts(tmp_path, name, dtype):
    make, embeddings = TEACHERS[name]
    path = write_conditions(tmp_path / "conditions.safetensors", embeddings())
    stock = make()
    folder = write(tmp_path / name, stock)
    teacher = load(folder, size=[16, 24], conditions=path, dtype=dtype)
    part = "unet" if name == "sd" else "transformer"
    expected = type(vars(stock)[part]).from_pretrained(folder / part, torch_dtype=getattr(torch, dtype))
    for ours, theirs in (
        (teacher.network.named_parameters(), expected.named_parameters()),
        (teacher.network.named_buffers(), expected.named_buffers()),
    ):
        ours, theirs = dict(ours), dict(theirs)
        assert ours.keys() == theirs.keys()
        assert all(each.dtype == theirs[key].dtype and torch.equal(each, theirs[key]) for key, each in ours.items())
    x, cond = normal(2, *teacher.shape), conditions(teacher, 2)
    first, last = teacher.field.t_range
    t = torch.tensor([0.3 * first + 0.7 * last, 0.5 * first + 0.5 * last])
    with torch.no_grad():
        found = teacher.field(x, t, cond)
        assert found.dtype == torch.float32
        assert torch.equal(found, dataclasses.replace(teacher.field, network=expected)(x, t, cond))


def pixels(tmp_path, dtype: str):
    """A teacher of a DDPM pipeline on images [1, 8, 8]."""
    network = seeded(
        lambda: UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
            layers_per_block=1, num_class_embeds=4, attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )  # fmt: skip
    network.save_pretrained(tmp_path / "pixels" / "unet")
    DDPMScheduler(prediction_type="epsilon").save_pretrained(tmp_path / "pixels" / "scheduler")
    return load(tmp_path / "pixels" / "unet", dtype=dtype)


def latents(tmp_path, name: str, dtype: str):
    make, embeddings = TEACHERS[name]
    path = write_conditions(tmp_path / "conditions.safetensors", embeddings())
    return load(write(tmp_path / name, make()), size=[16, 24], conditions=path, dtype=dtype)


@pytest.mark.parametrize("name", ["flux", *(pytest.param(name, marks=pytest.mark.long) for name in ("sd", "pixels"))])
def test_everything_that_is_trained_is_in_float32(tmp_path, name):
    def read(dtype: str):
        return pixels(tmp_path, dtype) if name == "pixels" else latents(tmp_path, name, dtype)

    half, full = read("bfloat16"), read("float32")
    full.network.load_state_dict(half.network.state_dict())  # the same weights, in float32
    teacher, exact = teacher_on_linear_path(half), teacher_on_linear_path(full)
    x, t, cond = normal(2, *teacher.shape), torch.tensor([0.3, 0.8]), conditions(teacher, 2)

    def networks(of):
        made = StudentInit(of, None, of.shape, of.num_classes, 0, of)
        yield made.velocity_field(), (x, t, cond)
        yield made.flow_map(), (x, t, 0 * t, cond)
        yield made.acceleration(), (x, t, x, cond)
        yield made.critic(), (x, t, cond)

    for (ours, inputs), (theirs, _) in zip(networks(teacher), networks(exact), strict=True):
        assert {each.dtype for each in ours.parameters()} == {torch.float32}
        found, expected = ours.eval()(*inputs), theirs.eval()(*inputs)
        pairs = [(found, expected)] if isinstance(found, torch.Tensor) else zip(found, expected, strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        (found if isinstance(found, torch.Tensor) else found[0]).square().sum().backward()
        assert {each.grad.dtype for each in ours.parameters() if each.grad is not None} == {torch.float32}
    with torch.no_grad():  # the frozen teacher stays as it is
        assert torch.bfloat16 in {each.dtype for each in teacher.network.parameters()}
        found, expected = teacher.field(x, t, cond), Rescheduled(half.field, linear())(x, t.double(), cond)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
        assert not torch.equal(found, exact.field(x, t, cond))
