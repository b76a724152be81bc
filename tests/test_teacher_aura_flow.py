"""AuraFlow as a teacher."""

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from latent import (
    NEGATIVE,
    PROMPTS,
    VOCABULARY,
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
from transformers import UMT5Config, UMT5EncoderModel

from distill.core.errors import InputError
from distill.flow.interpolants import linear
from distill.teachers.architectures.aura_flow import ARCHITECTURE
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher AuraFlowTransformer2DModel")


def pipeline(*, texts: dict | None = None) -> AuraFlowPipeline:
    network = seeded(
        lambda: AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pos_embed_max_size=36,
        )
    )
    texts = texts or {"text_encoder": None, "tokenizer": None}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    found = AuraFlowPipeline(vae=autoencoder(), transformer=network, scheduler=scheduler, **texts)
    found.set_progress_bar_config(disable=True)
    return found


def embeddings(seed: int) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": normal(3, 7, 24, seed=seed)}


def test_equals_the_pipeline(tmp_path):
    stock = pipeline()
    rows, null = embeddings(2), {name: each[:1] for name, each in embeddings(5).items()}
    path = write_conditions(tmp_path / "conditions.safetensors", rows, null)
    teacher = load(write(tmp_path / "aura_flow", stock), size=[16, 24], conditions=path)
    assert teacher.shape == (4, 8, 12)
    noise, mask = normal(3, 4, 8, 12), torch.ones(3, 7)
    finite_at_both_ends(teacher, noise)
    for scale in (1.0, 3.0):
        expected = stock(
            height=16, width=24, num_inference_steps=4, output_type="latent", guidance_scale=scale, latents=noise,
            prompt_embeds=rows["encoder_hidden_states"], prompt_attention_mask=mask,
            negative_prompt_embeds=null["encoder_hidden_states"].expand(3, -1, -1),
            negative_prompt_attention_mask=mask,
        ).images  # fmt: skip
        same(ours(teacher, stock.scheduler.sigmas, noise, scale), expected)
    fits_students(teacher, noise)


def test_an_oracle_gives_back_its_velocity():
    def network(*, hidden_states, timestep, encoder_hidden_states, return_dict):
        return (exact(hidden_states, timestep),)

    field = NetworkField(as_module(network), linear(), "velocity", 1000.0, call=ARCHITECTURE.call)
    x, t = normal(3, 4, 8, 12), torch.tensor([0.1, 0.5, 0.9])
    assert (field(x, t, embeddings(2)) - exact(x, t)).abs().max() <= 1e-6


def test_sizes_without_positions_are_refused(tmp_path):
    folder = write(tmp_path / "aura_flow", pipeline())
    with pytest.raises(InputError, match="latents of 14x8, but the network .* has positions for 12x12; give smaller"):
        load(folder, size=[28, 16])


@pytest.mark.long
def test_encodes_prompts_as_the_pipeline(tmp_path):
    config = UMT5Config(vocab_size=VOCABULARY, d_model=24, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    stock = pipeline(texts={"text_encoder": seeded(lambda: UMT5EncoderModel(config)), "tokenizer": tokenizer(512)})
    teacher, noise = prompted(tmp_path, stock, size=[16, 24]), normal(2, 4, 8, 12)
    states = teacher.conditioning.rows.take(torch.arange(2))["encoder_hidden_states"]
    assert states.shape == (2, 256, 24)
    assert states.any(2).sum(1).tolist() == [len(prompt) + 1 for prompt in PROMPTS]  # with <eos>
    expected = stock(
        prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, height=16, width=24, num_inference_steps=2,
        output_type="latent", guidance_scale=3.0, latents=noise,
    ).images  # fmt: skip
    same(ours(teacher, stock.scheduler.sigmas, noise, 3.0), expected, within=1e-5)  # the text has little weight here
