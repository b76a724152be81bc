"""FLUX.1 as a teacher."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
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

from distill.flow.interpolants import linear
from distill.teachers.architectures.flux import ARCHITECTURE
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher FluxTransformer2DModel")

STEPS = 4


def pipeline(*, guidance_embeds: bool, texts: dict | None = None) -> FluxPipeline:
    network = seeded(
        lambda: FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=guidance_embeds,
        )
    )
    vae = autoencoder(scaling_factor=0.36, shift_factor=0.1)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    found = FluxPipeline(scheduler, vae, transformer=network, **(dict.fromkeys(names) | (texts or {})))
    found.set_progress_bar_config(disable=True)
    return found


def embeddings(seed: int) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": normal(3, 7, 32, seed=seed), "pooled_projections": normal(3, 24, seed=seed + 1)}


@pytest.mark.parametrize("guidance", [None, 2.5], ids=["schnell", "dev"])
def test_equals_the_pipeline(tmp_path, guidance):
    stock = pipeline(guidance_embeds=guidance is not None)
    rows, null = embeddings(2), embeddings(5)
    path = write_conditions(tmp_path / "conditions.safetensors", rows, {k: v[:1] for k, v in null.items()})
    teacher = load(write(tmp_path / "flux", stock), size=[16, 24], conditions=path, embedded_guidance=guidance)
    assert teacher.shape == (4, 8, 12)
    noise = normal(3, 4, 8, 12)

    def theirs(scale):
        found = stock(
            height=16, width=24, num_inference_steps=STEPS, output_type="latent", guidance_scale=guidance or 0.0,
            latents=stock._pack_latents(noise, 3, 4, 8, 12), prompt_embeds=rows["encoder_hidden_states"],
            pooled_prompt_embeds=rows["pooled_projections"], true_cfg_scale=scale,
            negative_prompt_embeds=null["encoder_hidden_states"][:1].expand(3, -1, -1),
            negative_pooled_prompt_embeds=null["pooled_projections"][:1].expand(3, -1),
        ).images  # fmt: skip
        return stock._unpack_latents(found, 16, 24, 2)

    finite_at_both_ends(teacher, noise)
    for scale in (1.0, 3.0):
        expected = theirs(scale)
        same(ours(teacher, stock.scheduler.sigmas, noise, scale), expected)
    fits_students(teacher, noise)


def test_an_oracle_gives_back_its_velocity():
    def network(*, hidden_states, timestep, guidance, **others):
        x = FluxPipeline._unpack_latents(hidden_states, 16, 24, 2)
        return (FluxPipeline._pack_latents(exact(x, timestep), 3, 4, 8, 12),)

    field = NetworkField(as_module(network), linear(), "velocity", 1000.0, call=ARCHITECTURE.call)
    x, t = normal(3, 4, 8, 12), torch.tensor([0.1, 0.5, 0.9])
    assert (field(x, t, embeddings(2)) - exact(x, t)).abs().max() <= 1e-6


@pytest.mark.long
def test_encodes_prompts_as_the_pipeline(tmp_path):
    texts = {
        "text_encoder": clip(24),
        "tokenizer": tokenizer(),
        "text_encoder_2": t5(32),
        "tokenizer_2": tokenizer(512),
    }
    stock = pipeline(guidance_embeds=True, texts=texts)
    teacher = prompted(tmp_path, stock, size=[16, 24], embedded_guidance=2.5)
    assert teacher.conditioning.rows.take(torch.arange(2))["encoder_hidden_states"].shape == (2, 512, 32)
    noise = normal(2, 4, 8, 12)
    found = stock(
        prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, height=16, width=24, num_inference_steps=2,
        output_type="latent", guidance_scale=2.5, true_cfg_scale=3.0, latents=stock._pack_latents(noise, 2, 4, 8, 12),
    ).images  # fmt: skip
    same(ours(teacher, stock.scheduler.sigmas, noise, 3.0), stock._unpack_latents(found, 16, 24, 2))
