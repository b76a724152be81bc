"""Stable Diffusion 3 and 3.5 as teachers."""

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from latent import (
    NEGATIVE,
    PROMPTS,
    as_module,
    autoencoder,
    exact,
    finite_at_both_ends,
    fits_students,
    load,
    normal,
    ours,
    prompted,
    same,
    seeded,
    tokenizer,
    write,
    write_conditions,
)
from texts import clip, t5

from distill.core.errors import InputError
from distill.flow.interpolants import linear
from distill.teachers.architectures.sd3 import ARCHITECTURE
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher SD3Transformer2DModel")

VERSIONS = {"3": {}, "3.5": {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}}


def pipeline(*, version: str = "3", texts: dict | None = None) -> StableDiffusion3Pipeline:
    network = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            pos_embed_max_size=6,
            **VERSIONS[version],
        )
    )
    vae = autoencoder(scaling_factor=1.5, shift_factor=0.06)
    names = [f"{kind}{suffix}" for kind in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3")]
    found = StableDiffusion3Pipeline(
        network, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, **(dict.fromkeys(names) | (texts or {}))
    )
    found.set_progress_bar_config(disable=True)
    return found


def embeddings(seed: int) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": normal(3, 7, 32, seed=seed), "pooled_projections": normal(3, 24, seed=seed + 1)}


@pytest.mark.parametrize("version", VERSIONS)
def test_equals_the_pipeline(tmp_path, version):
    stock = pipeline(version=version)
    rows, null = embeddings(2), {name: each[:1] for name, each in embeddings(5).items()}
    path = write_conditions(tmp_path / "conditions.safetensors", rows, null)
    teacher = load(write(tmp_path / "sd3", stock), size=[16, 24], conditions=path)
    assert teacher.shape == (4, 8, 12)
    noise = normal(3, 4, 8, 12)
    finite_at_both_ends(teacher, noise)
    for scale in (1.0, 3.0):
        expected = stock(
            height=16, width=24, num_inference_steps=4, output_type="latent", guidance_scale=scale, latents=noise,
            prompt_embeds=rows["encoder_hidden_states"], pooled_prompt_embeds=rows["pooled_projections"],
            negative_prompt_embeds=null["encoder_hidden_states"].expand(3, -1, -1),
            negative_pooled_prompt_embeds=null["pooled_projections"].expand(3, -1),
        ).images  # fmt: skip
        same(ours(teacher, stock.scheduler.sigmas, noise, scale), expected)
    fits_students(teacher, noise)


def test_an_oracle_gives_back_its_velocity():
    def network(*, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict):
        return (exact(hidden_states, timestep / 1000),)

    field = NetworkField(as_module(network), linear(), "velocity", 1000.0, call=ARCHITECTURE.call)
    x, t = normal(3, 4, 8, 12), torch.tensor([0.1, 0.5, 0.9])
    assert (field(x, t, embeddings(2)) - exact(x, t)).abs().max() <= 1e-6


def test_sizes_without_positions_are_refused(tmp_path):
    folder = write(tmp_path / "sd3", pipeline())
    with pytest.raises(InputError, match="latents of 8x14, but the network .* has positions for 12x12; give smaller"):
        load(folder, size=[16, 28])


@pytest.mark.long
@pytest.mark.parametrize("with_t5", [True, False])
def test_encodes_prompts_as_the_pipeline(tmp_path, with_t5):
    texts = {
        "text_encoder": clip(12, 12, 1),
        "tokenizer": tokenizer(),
        "text_encoder_2": clip(12, 12, 2),
        "tokenizer_2": tokenizer(),
    }
    if with_t5:
        texts |= {"text_encoder_3": t5(32), "tokenizer_3": tokenizer(512)}
    stock = pipeline(texts=texts)
    teacher, noise = prompted(tmp_path, stock, size=[16, 24]), normal(2, 4, 8, 12)
    assert teacher.conditioning.rows.take(torch.arange(2))["encoder_hidden_states"].shape == (2, 77 + 256, 32)
    expected = stock(
        prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, height=16, width=24, num_inference_steps=2,
        output_type="latent", guidance_scale=3.0, latents=noise,
    ).images  # fmt: skip
    same(ours(teacher, stock.scheduler.sigmas, noise, 3.0), expected)
