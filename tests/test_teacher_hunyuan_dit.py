"""HunyuanDiT as a teacher."""

from types import SimpleNamespace

import pytest
import torch
from checkpoints import refused
from diffusers import HunyuanDiT2DModel, HunyuanDiTPipeline
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
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
from texts import bert, t5

from distill.flow.interpolants import vp
from distill.teachers.architectures.hunyuan_dit import ARCHITECTURE, region
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher HunyuanDiT2DModel")

LENGTHS = {"text_len": 6, "text_len_t5": 5}


def pipeline(*, takes_sizes: bool = True, texts=(None,) * 4, **lengths) -> HunyuanDiTPipeline:
    """texts: text encoders and tokenizers. The pipeline expects an autoencoder that makes the sides 8 times smaller."""
    network = seeded(
        lambda: HunyuanDiT2DModel(
            sample_size=8,
            in_channels=4,
            patch_size=2,
            num_layers=4,
            num_attention_heads=2,
            attention_head_dim=8,
            hidden_size=16,
            mlp_ratio=1.0,
            cross_attention_dim=16,
            cross_attention_dim_t5=8,
            pooled_projection_dim=12,
            use_style_cond_and_image_meta_size=takes_sizes,
            **lengths,
        )
    )
    scheduler = ddim(beta_schedule="scaled_linear", beta_start=0.00085, prediction_type="v_prediction")
    encoder, encoder_2, one, two = texts
    found = HunyuanDiTPipeline(
        autoencoder(4, scaling_factor=0.13), encoder, one, network, scheduler, None, None, False, encoder_2, two
    )
    found.set_progress_bar_config(disable=True)
    return found


def embeddings(seed: int) -> dict[str, torch.Tensor]:
    return {
        "encoder_hidden_states": normal(3, 6, 16, seed=seed),
        "text_embedding_mask": (torch.arange(6) < torch.tensor([[6], [2], [4]])).long(),
        "encoder_hidden_states_t5": normal(3, 5, 8, seed=seed + 1),
        "text_embedding_mask_t5": (torch.arange(5) < torch.tensor([[5], [4], [1]])).long(),
    }


def stock_latents(stock, noise, rows, null, scale: float) -> torch.Tensor:
    given = {}
    for prefix, each in (("", rows), ("negative_", null)):
        for suffix, end in (("", ""), ("_2", "_t5")):
            given[f"{prefix}prompt_embeds{suffix}"] = each[f"encoder_hidden_states{end}"]
            given[f"{prefix}prompt_attention_mask{suffix}"] = each[f"text_embedding_mask{end}"]
    return stock(
        height=64, width=96, num_inference_steps=4, output_type="latent", guidance_scale=scale, latents=noise,
        use_resolution_binning=False, **given,
    ).images  # fmt: skip


@pytest.mark.parametrize("takes_sizes", [True, False], ids=["1.1", "1.2"])
def test_equals_the_pipeline(tmp_path, takes_sizes):
    stock = pipeline(takes_sizes=takes_sizes, **LENGTHS)
    rows, null = embeddings(2), {name: each[1:2] for name, each in embeddings(5).items()}
    path = write_conditions(tmp_path / "conditions.safetensors", rows, null)
    teacher = load(write(tmp_path / "hunyuan", stock), size=[64, 96], conditions=path)
    assert teacher.shape == (4, 8, 12)
    noise = normal(3, 4, 8, 12)
    finite_at_both_ends(teacher, noise[:1])
    for scale in (1.0, 3.0):
        expected = stock_latents(stock, noise, rows, {k: v.expand_as(rows[k]) for k, v in null.items()}, scale)
        same(ours(teacher, vp_grid(stock.scheduler), noise, scale), expected)
    fits_students(teacher, noise)


def test_an_oracle_gives_back_its_velocity():
    table = ddim().alphas_cumprod

    def network(x, timestep, *, image_meta_size, style, image_rotary_emb, return_dict, **texts):
        assert texts.keys() == embeddings(2).keys()
        noise = exact_epsilon(x, timestep, table)
        return (torch.cat([noise, torch.full_like(noise, torch.nan)], dim=1),)

    network.config = SimpleNamespace(patch_size=2, attention_head_dim=8)
    field = NetworkField(as_module(network), vp(table), "epsilon", 999.0, call=ARCHITECTURE.call)
    x, t = normal(3, 4, 8, 12), torch.tensor([0.1, 0.5, 0.9])
    noise = exact_epsilon(x, 999 * t, table)
    expected = vp(table).convert(x.double(), noise.double(), t.double(), "epsilon", "velocity")
    assert (field(x, t, embeddings(2)) - expected).abs().max() <= 1e-6


def test_what_does_not_fit_is_refused(tmp_path):
    folder = write(tmp_path / "hunyuan", pipeline(**LENGTHS))
    rows = embeddings(2) | {"text_embedding_mask": torch.ones(3, 7, dtype=torch.int64)}
    path = write_conditions(tmp_path / "conditions.safetensors", rows)
    refused(folder, "text_embedding_mask has rows of shape [7]; valid for this network: [6]", conditions=path)
    edit(folder / "transformer" / "config.json", learn_sigma=False)
    refused(folder, "learn_sigma=false; valid: true, because the prediction is the first half of the output")
    edit(folder / "transformer" / "config.json", in_channels=None)
    refused(folder, "in_channels=None; valid: a valid integer")


def test_positions_are_those_of_the_pipeline():
    for height, width in [(32, 32), (64, 64), (48, 80), (80, 48), (7, 31), (40, 1)]:
        assert region(height, width, 32) == get_resize_crop_region_for_grid((height, width), 32)


@pytest.mark.long
@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_encodes_prompts_as_the_pipeline(tmp_path, negative):
    stock, noise = pipeline(texts=(bert(16), t5(8), tokenizer(), tokenizer())), normal(2, 4, 8, 12)
    teacher = prompted(tmp_path, stock, negative, size=[64, 96])
    expected = stock(
        prompt=PROMPTS, negative_prompt=[negative] * 2, height=64, width=96, num_inference_steps=2,
        output_type="latent", guidance_scale=3.0, latents=noise, use_resolution_binning=False,
    ).images  # fmt: skip
    same(ours(teacher, vp_grid(stock.scheduler), noise, 3.0), expected)
