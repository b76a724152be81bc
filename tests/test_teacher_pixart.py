"""PixArt-alpha and PixArt-Sigma as teachers."""

import pytest
import torch
from checkpoints import refused
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from latent import (
    NEGATIVE,
    PROMPTS,
    as_module,
    autoencoder,
    ddim,
    edit,
    exact_epsilon,
    finite_at_both_ends,
    fits_students,
    load,
    normal,
    ours,
    prompted,
    same,
    seeded,
    tokenizer,
    vp_grid,
    write,
    write_conditions,
)
from texts import t5

from distill.flow.interpolants import vp
from distill.teachers.architectures.pixart import ARCHITECTURE
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher PixArtTransformer2DModel")

VERSIONS = {"alpha": (PixArtAlphaPipeline, None), "sigma": (PixArtSigmaPipeline, False)}  # with, and without sizes


def pipeline(version: str, text_tokenizer=None, text_encoder=None):
    kind, takes_sizes = VERSIONS[version]
    network = seeded(
        lambda: PixArtTransformer2DModel(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
            use_additional_conditions=takes_sizes,
        )
    )
    vae, scheduler = autoencoder(scaling_factor=0.18), ddim(beta_end=0.01)
    found = kind(text_tokenizer, text_encoder, vae, network, scheduler)
    found.set_progress_bar_config(disable=True)
    return found


def embeddings(seed: int) -> dict[str, torch.Tensor]:
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]])
    return {"encoder_hidden_states": normal(3, 7, 16, seed=seed), "encoder_attention_mask": mask.long()}


def stock_latents(stock, noise, rows, null, scale: float) -> torch.Tensor:
    return stock(
        height=16, width=24, num_inference_steps=4, output_type="latent", guidance_scale=scale, latents=noise,
        prompt_embeds=rows["encoder_hidden_states"], prompt_attention_mask=rows["encoder_attention_mask"],
        negative_prompt=None, negative_prompt_embeds=null["encoder_hidden_states"],
        negative_prompt_attention_mask=null["encoder_attention_mask"], use_resolution_binning=False,
    ).images  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_equals_the_pipeline(tmp_path, version):
    stock = pipeline(version)
    rows, null = embeddings(2), {name: each[1:2] for name, each in embeddings(5).items()}
    path = write_conditions(tmp_path / "conditions.safetensors", rows, null)
    teacher = load(write(tmp_path / "pixart", stock), size=[16, 24], conditions=path)
    assert teacher.shape == (4, 8, 12)
    noise = normal(3, 4, 8, 12)
    finite_at_both_ends(teacher, noise[:1])
    for scale in (1.0, 3.0):
        expected = stock_latents(stock, noise, rows, {k: v.expand_as(rows[k]) for k, v in null.items()}, scale)
        same(ours(teacher, vp_grid(stock.scheduler), noise, scale), expected)
    fits_students(teacher, noise)


def test_an_oracle_gives_back_its_velocity():
    table = ddim().alphas_cumprod

    def network(x, *, timestep, encoder_hidden_states, encoder_attention_mask, added_cond_kwargs, return_dict):
        assert added_cond_kwargs == {"resolution": None, "aspect_ratio": None}
        noise = exact_epsilon(x, timestep, table)
        return (torch.cat([noise, torch.full_like(noise, torch.nan)], dim=1),)

    field = NetworkField(as_module(network), vp(table), "epsilon", 999.0, call=ARCHITECTURE.call)
    x, t = normal(3, 4, 8, 12), torch.tensor([0.1, 0.5, 0.9])
    noise = exact_epsilon(x, 999 * t, table)
    expected = vp(table).convert(x.double(), noise.double(), t.double(), "epsilon", "velocity")
    assert (field(x, t, embeddings(2)) - expected).abs().max() <= 1e-6


def test_configs_of_the_time_before_the_class_was_split_are_read(tmp_path):
    folder = write(tmp_path / "pixart", pipeline("sigma"))
    edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel", num_vector_embeds=None)
    path = write_conditions(tmp_path / "conditions.safetensors", embeddings(2))
    assert isinstance(load(folder, size=[16, 24], conditions=path).network, PixArtTransformer2DModel)


def test_what_does_not_fit_is_refused(tmp_path):
    folder = write(tmp_path / "pixart", pipeline("sigma"))
    rows = embeddings(2)
    path = write_conditions(tmp_path / "without.safetensors", {"encoder_hidden_states": rows["encoder_hidden_states"]})
    refused(folder, "does not fit the teacher's network: missing encoder_attention_mask", conditions=path)
    path = write_conditions(tmp_path / "sizes.safetensors", rows | {"resolution": torch.ones(3, 2)})
    refused(folder, "does not fit the teacher's network: unknown resolution", conditions=path)
    refused(folder, "latents of 9x12, but the network (", "patches of 2x2; give other sides", size=[18, 24])
    edit(folder / "transformer" / "config.json", out_channels=4)
    refused(folder, "in_channels=4, out_channels=4; valid: networks with a learned variance")


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_encodes_prompts_as_the_pipeline(tmp_path, version, negative):
    stock, noise = pipeline(version, tokenizer(), t5(16)), normal(2, 4, 8, 12)
    teacher = prompted(tmp_path, stock, negative, size=[16, 24])
    length = {"alpha": 120, "sigma": 300}[version]
    assert teacher.conditioning.rows.take(torch.arange(2))["encoder_attention_mask"].shape == (2, length)
    expected = stock(
        prompt=PROMPTS, negative_prompt=negative, height=16, width=24, num_inference_steps=2, output_type="latent",
        guidance_scale=3.0, latents=noise, use_resolution_binning=False,
    ).images  # fmt: skip
    same(ours(teacher, vp_grid(stock.scheduler), noise, 3.0), expected)
