"""FLUX.2 as a teacher: dev, whose guidance is embedded, and klein, with classifier-free guidance."""

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from latent import (
    PROMPTS,
    VOCABULARY,
    as_module,
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
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distill.flow.interpolants import linear
from distill.teachers.architectures.flux2 import ARCHITECTURE
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher Flux2Transformer2DModel")


def pipeline(kind, *, texts: dict | None = None) -> Flux2Pipeline | Flux2KleinPipeline:
    network = seeded(
        lambda: Flux2Transformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=kind is Flux2Pipeline,
        )
    )
    vae = seeded(
        lambda: AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=2,
            norm_num_groups=4,
            decoder_block_out_channels=(8, 8),
        )
    )
    vae.bn.running_mean.copy_(0.3 * normal(8))
    vae.bn.running_var.copy_(normal(8).exp())
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    texts = texts or {"text_encoder": None, "tokenizer": None}
    found = kind(scheduler, vae, transformer=network, **texts)
    found.set_progress_bar_config(disable=True)
    return found


def latents_of(stock: Flux2Pipeline | Flux2KleinPipeline, output: torch.Tensor) -> torch.Tensor:
    """[B, 8, 4, 6] of what a pipeline returns as latents: dev tokens, klein what its autoencoder decodes."""
    if isinstance(stock, Flux2Pipeline):
        return output.transpose(1, 2).unflatten(2, (4, 6))
    patches, norm = stock._patchify_latents(output), stock.vae.bn
    mean, variance = (each[:, None, None] for each in (norm.running_mean, norm.running_var))
    return (patches - mean) / (variance + stock.vae.config.batch_norm_eps).sqrt()


def embeddings(seed: int) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": normal(3, 7, 24, seed=seed)}


@pytest.mark.parametrize("kind", [Flux2Pipeline, Flux2KleinPipeline])
def test_equals_the_pipeline(tmp_path, kind):
    stock = pipeline(kind)
    rows, null = embeddings(2), {name: each[:1] for name, each in embeddings(5).items()}
    path = write_conditions(tmp_path / "conditions.safetensors", rows, null)
    guidance = {"embedded_guidance": 2.5} if kind is Flux2Pipeline else {}
    teacher = load(write(tmp_path / "flux2", stock), size=[16, 24], conditions=path, **guidance)
    assert teacher.shape == teacher.codec.shape((3, 16, 24)) == (8, 4, 6)
    noise = normal(3, 8, 4, 6)
    finite_at_both_ends(teacher, noise)
    for scale in (1.0, 3.0):
        options = {"guidance_scale": 2.5}
        if kind is Flux2KleinPipeline:
            negative = null["encoder_hidden_states"].expand(3, -1, -1)
            options = {"guidance_scale": scale, "negative_prompt_embeds": negative}
        elif scale != 1.0:
            continue
        expected = stock(
            height=16, width=24, num_inference_steps=4, output_type="latent", latents=noise,
            prompt_embeds=rows["encoder_hidden_states"], **options,
        ).images  # fmt: skip
        same(ours(teacher, stock.scheduler.sigmas, noise, scale), latents_of(stock, expected))
    fits_students(teacher, noise)


def test_the_codec_decodes_and_encodes_as_the_pipeline(tmp_path):
    stock = pipeline(Flux2KleinPipeline)
    path = write_conditions(tmp_path / "conditions.safetensors", embeddings(2))
    teacher = load(write(tmp_path / "flux2", stock), size=[16, 24], conditions=path)
    noise = normal(3, 8, 4, 6)
    expected = stock(
        height=16, width=24, num_inference_steps=1, output_type="pt", guidance_scale=1.0, latents=noise,
        prompt_embeds=embeddings(2)["encoder_hidden_states"],
    ).images  # fmt: skip
    decoded = teacher.codec.decode(ours(teacher, stock.scheduler.sigmas, noise))
    same((decoded / 2 + 0.5).clamp(0, 1), expected)
    pixels = normal(2, 3, 16, 24).clamp(-1, 1)
    with torch.no_grad():
        same(teacher.codec.encode(pixels), stock._encode_vae_image(pixels, None))


def test_an_oracle_gives_back_its_velocity():
    def network(*, hidden_states, timestep, **others):
        return (exact(hidden_states, timestep),)

    field = NetworkField(as_module(network), linear(), "velocity", 1000.0, call=ARCHITECTURE.call)
    x, t = normal(3, 8, 4, 6), torch.tensor([0.1, 0.5, 0.9])
    assert (field(x, t, embeddings(2)) - exact(x, t)).abs().max() <= 1e-6


TEMPLATES = {  # of chats whose messages are lists of parts, and of those whose messages are texts
    Flux2Pipeline: "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
    Flux2KleinPipeline: "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
}


@pytest.mark.long
@pytest.mark.parametrize("kind", [Flux2Pipeline, Flux2KleinPipeline])
def test_encodes_prompts_as_the_pipeline(tmp_path, kind):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
    }
    if kind is Flux2Pipeline:
        vision = PixtralVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32
        )
        text = MistralConfig(**sizes, num_hidden_layers=30)
        encoder = Mistral3ForConditionalGeneration(
            Mistral3Config(vision_config=vision, text_config=text, image_token_index=3)
        )
    else:
        encoder = Qwen3ForCausalLM(Qwen3Config(**sizes, num_hidden_layers=27))
    texts = {"text_encoder": encoder.eval(), "tokenizer": tokenizer(512, "left", TEMPLATES[kind])}
    stock = pipeline(kind, texts=texts)
    guided = {"embedded_guidance": 3.0} if kind is Flux2Pipeline else {}
    teacher, noise = prompted(tmp_path, stock, size=[16, 24], negative="", **guided), normal(2, 8, 4, 6)
    assert teacher.conditioning.rows.take(torch.arange(2))["encoder_hidden_states"].shape == (2, 512, 24)
    found = stock(
        prompt=PROMPTS, height=16, width=24, num_inference_steps=2, output_type="latent", guidance_scale=3.0,
        latents=noise,
    ).images  # fmt: skip
    scale = 1.0 if kind is Flux2Pipeline else 3.0
    same(ours(teacher, stock.scheduler.sigmas, noise, scale), latents_of(stock, found))
