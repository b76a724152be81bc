"""DiT as a teacher."""

import pytest
import torch
from checkpoints import refused
from diffusers import DiTPipeline, DiTTransformer2DModel
from latent import (
    as_module,
    autoencoder,
    conditions,
    ddim,
    edit,
    exact_epsilon,
    finite_at_both_ends,
    fits_students,
    load,
    normal,
    ours,
    same,
    seeded,
    vp_grid,
    write,
    write_conditions,
)

from distill.flow.interpolants import vp
from distill.students import native
from distill.teachers.architectures.dit import ARCHITECTURE
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher DiTTransformer2DModel")


def pipeline(**options) -> DiTPipeline:
    given = {
        "sample_size": 8,
        "out_channels": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        **options,
    }
    found = DiTPipeline(
        seeded(lambda: DiTTransformer2DModel(**given)), autoencoder(scaling_factor=0.18), ddim(beta_end=0.01)
    )
    found.set_progress_bar_config(disable=True)
    return found


def test_equals_the_pipeline(tmp_path):
    """The pipeline takes a generator instead of latents, and returns decoded ones; they are caught before that."""
    stock, latents = pipeline(), []
    teacher = load(write(tmp_path / "dit", stock))
    assert teacher.shape == (4, 8, 8)
    assert (teacher.num_classes, teacher.null_class) == (1000, 1000)
    noise = normal(3, 4, 8, 8, seed=5)
    finite_at_both_ends(teacher, noise[:1])
    stock.vae.post_quant_conv.register_forward_pre_hook(lambda module, inputs: latents.append(inputs[0]))
    for scale in (1.0, 3.0):
        stock([0, 1, 2], scale, torch.Generator().manual_seed(5), num_inference_steps=4, output_type="pt")
        same(ours(teacher, vp_grid(stock.scheduler), noise, scale), 0.18 * latents.pop())
    fits_students(teacher, noise)


def test_classes_are_not_dropped_in_training(tmp_path):
    teacher = load(write(tmp_path / "dit", pipeline()))
    x, time, cond = normal(64, 4, 8, 8), torch.full((64,), 500.0), conditions(teacher, 64)
    with torch.no_grad():
        expected = ARCHITECTURE.call(teacher.network, x, time, cond)
        assert torch.equal(ARCHITECTURE.call(teacher.network.train(), x, time, cond), expected)
        wide = native.accelerated(teacher.network)
        assert wide.training
        same(ARCHITECTURE.call(wide, torch.cat([x, x], dim=1), time, cond), expected, 1e-5)


def test_configs_of_the_time_before_the_class_was_split_are_read(tmp_path):
    folder = write(tmp_path / "dit", pipeline())
    expected = load(folder).field(normal(1, 4, 8, 8), torch.tensor([0.5]), {"class_labels": torch.tensor([7])})
    old = {"cross_attention_dim": None, "num_vector_embeds": None, "use_linear_projection": False}
    edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel", **old)
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    teacher = load(folder)
    assert isinstance(teacher.network, DiTTransformer2DModel)
    assert torch.equal(
        teacher.field(normal(1, 4, 8, 8), torch.tensor([0.5]), {"class_labels": torch.tensor([7])}), expected
    )
    edit(folder / "transformer" / "config.json", norm_type="layer_norm")
    refused(folder, "network class Transformer2DModel is not supported")


def test_an_oracle_gives_back_its_velocity():
    table = ddim().alphas_cumprod

    def network(hidden_states, timestep, class_labels, return_dict):
        noise = exact_epsilon(hidden_states, timestep, table)
        return (torch.cat([noise, torch.full_like(noise, torch.nan)], dim=1),)

    field = NetworkField(as_module(network), vp(table), "epsilon", 999.0, call=ARCHITECTURE.call)
    x, t = normal(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    noise = exact_epsilon(x, 999 * t, table)
    expected = vp(table).convert(x.double(), noise.double(), t.double(), "epsilon", "velocity")
    assert (field(x, t, {"class_labels": torch.arange(3)}) - expected).abs().max() <= 1e-6


def test_what_does_not_fit_is_refused(tmp_path):
    folder = write(tmp_path / "dit", pipeline(num_embeds_ada_norm=10))
    assert load(folder, null_class=10).null_class == 10
    refused(folder, "teacher.null_class=3: ", "has 10 classes and one more embedding", null_class=3)
    refused(folder, "latents of 8x12, but the network (", "makes squares only; give equal sides", size=[16, 24])
    refused(folder, "teacher.embedded_guidance has no effect: the network (", embedded_guidance=2.0)
    path = write_conditions(tmp_path / "conditions.safetensors", {"encoder_hidden_states": normal(1, 3, 4)})
    refused(folder, "teacher.conditions has no effect: the network (", "conditioned on classes only", conditions=path)
    edit(folder / "transformer" / "config.json", out_channels=None)
    refused(folder, "in_channels=4, out_channels=None; valid: networks with a learned variance, whose out_channels")
