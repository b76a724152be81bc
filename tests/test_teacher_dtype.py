"""Teachers in bfloat16 and float16: the network is that of diffusers in this data type."""

import dataclasses

import pytest
import torch
from latent import conditions, ddim, load, normal, write, write_conditions
from test_teacher_flux import embeddings as flux_embeddings
from test_teacher_flux import pipeline as flux
from test_teacher_sd3 import embeddings as sd3_embeddings
from test_teacher_sd3 import pipeline as sd3
from test_teacher_unet_condition import SD
from test_teacher_unet_condition import embeddings as sd_embeddings
from test_teacher_unet_condition import pipeline as sd

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
