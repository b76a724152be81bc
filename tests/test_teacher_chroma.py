"""Chroma as a teacher."""

import pytest
import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
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
from texts import t5

from distill.flow.interpolants import linear
from distill.teachers.architectures.chroma import ARCHITECTURE
from distill.teachers.network_field import NetworkField

pytestmark = [
    pytest.mark.costs("teacher ChromaTransformer2DModel"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers about itself
]


def pipeline(*, texts: dict | None = None) -> ChromaPipeline:
    network = seeded(
        lambda: ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=8,
            approximator_hidden_dim=32,
            approximator_layers=1,
        )
    )
    vae = autoencoder(scaling_factor=0.36, shift_factor=0.1)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    texts = texts or {"text_encoder": None, "tokenizer": None}
    found = ChromaPipeline(scheduler, vae, transformer=network, **texts)
    found.set_progress_bar_config(disable=True)
    return found


def embeddings(seed: int) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([3, 7, 5])
    mask = (torch.arange(7) < lengths[:, None]).float()
    return {"encoder_hidden_states": normal(3, 7, 32, seed=seed), "attention_mask": mask}


def test_equals_the_pipeline(tmp_path):
    stock = pipeline()
    rows, null = embeddings(2), {name: each[:1] for name, each in embeddings(5).items()}
    path = write_conditions(tmp_path / "conditions.safetensors", rows, null)
    teacher = load(write(tmp_path / "chroma", stock), size=[16, 24], conditions=path)
    assert teacher.shape == (4, 8, 12)
    noise = normal(3, 4, 8, 12)
    finite_at_both_ends(teacher, noise)
    for scale in (1.0, 3.0):
        expected = stock(
            height=16, width=24, num_inference_steps=4, output_type="latent", guidance_scale=scale,
            latents=stock._pack_latents(noise, 3, 4, 8, 12), prompt_embeds=rows["encoder_hidden_states"],
            prompt_attention_mask=rows["attention_mask"],
            negative_prompt_embeds=null["encoder_hidden_states"].expand(3, -1, -1),
            negative_prompt_attention_mask=null["attention_mask"].expand(3, -1),
        ).images  # fmt: skip
        same(ours(teacher, stock.scheduler.sigmas, noise, scale), stock._unpack_latents(expected, 16, 24, 2))
    fits_students(teacher, noise)


def test_an_oracle_gives_back_its_velocity():
    def network(*, hidden_states, timestep, **others):
        x = ChromaPipeline._unpack_latents(hidden_states, 16, 24, 2)
        return (ChromaPipeline._pack_latents(exact(x, timestep), 3, 4, 8, 12),)

    field = NetworkField(as_module(network), linear(), "velocity", 1000.0, call=ARCHITECTURE.call)
    x, t = normal(3, 4, 8, 12), torch.tensor([0.1, 0.5, 0.9])
    assert (field(x, t, embeddings(2)) - exact(x, t)).abs().max() <= 1e-6


@pytest.mark.long
def test_encodes_prompts_as_the_pipeline(tmp_path):
    stock = pipeline(texts={"text_encoder": t5(32), "tokenizer": tokenizer(512)})
    teacher = prompted(tmp_path, stock, size=[16, 24])
    mask = teacher.conditioning.rows.take(torch.arange(2))["attention_mask"]
    assert mask.shape == (2, 512)
    assert mask.sum(1).tolist() == [len(prompt) + 2 for prompt in PROMPTS]  # with <eos>, and one token of padding
    noise = normal(2, 4, 8, 12)
    found = stock(
        prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, height=16, width=24, num_inference_steps=2,
        output_type="latent", guidance_scale=3.0, latents=stock._pack_latents(noise, 2, 4, 8, 12),
    ).images  # fmt: skip
    same(ours(teacher, stock.scheduler.sigmas, noise, 3.0), stock._unpack_latents(found, 16, 24, 2))
