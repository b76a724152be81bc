"""Stable Diffusion and SDXL as teachers."""

import json

import pytest
import torch
from diffusers import EDMEulerScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from latent import (
    PROMPTS,
    as_module,
    autoencoder,
    ddim,
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
from texts import clip

from distill.core.errors import InputError
from distill.flow.interpolants import vp
from distill.teachers.architectures.unet_condition import ARCHITECTURE
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher UNet2DConditionModel")

STEPS = 4
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 12,
}

MEAN, STD = [0.1, -0.2, 0.3, -0.4], [0.5, 0.6, 0.7, 0.8]  # of the latents


def unet(**options) -> UNet2DConditionModel:
    return seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
            **options,
        )
    )


def pipeline(scheduler, texts=(None,) * 4, *, xl: bool = False, **options):
    """texts: tokenizers and text encoders."""
    vae, network = autoencoder(scaling_factor=0.18), unet(**(XL if xl else {}), **options)
    if xl:
        one, two, encoder, encoder_2 = texts
        found = StableDiffusionXLPipeline(vae, encoder, encoder_2, one, two, network, scheduler)
    else:
        found = StableDiffusionPipeline(
            vae, texts[2], texts[0], network, scheduler, None, None, requires_safety_checker=False
        )
    found.set_progress_bar_config(disable=True)
    return found


def embeddings(seed: int, *, xl: bool) -> dict[str, torch.Tensor]:
    found = {"encoder_hidden_states": normal(3, 7, 16, seed=seed)}
    return found | ({"text_embeds": normal(3, 12, seed=seed + 1)} if xl else {})


def stock_latents(stock, noise, rows, null, scale: float, **options) -> torch.Tensor:
    given = {"prompt_embeds": rows["encoder_hidden_states"], "negative_prompt_embeds": null["encoder_hidden_states"]}
    if "text_embeds" in rows:
        given |= {"pooled_prompt_embeds": rows["text_embeds"], "negative_pooled_prompt_embeds": null["text_embeds"]}
    return stock(
        height=16, width=24, num_inference_steps=STEPS, guidance_scale=scale, latents=noise,
        **given, **{"output_type": "latent", **options},
    ).images  # fmt: skip


SCHEDULES = {
    "epsilon": {},
    "v_prediction": {"prediction_type": "v_prediction"},
    "zero-snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize(
    ("schedule", "xl"),
    [
        ("epsilon", False),
        pytest.param("v_prediction", False, marks=pytest.mark.long),
        ("zero-snr", False),
        ("epsilon", True),
    ],
)
def test_equals_the_pipeline(tmp_path, schedule, xl):
    stock = pipeline(ddim(**SD, **SCHEDULES[schedule]), xl=xl)
    rows, null = embeddings(2, xl=xl), embeddings(5, xl=xl)
    path = write_conditions(tmp_path / "conditions.safetensors", rows, {k: v[:1] for k, v in null.items()})
    teacher = load(write(tmp_path / "sd", stock), size=[16, 24], conditions=path)
    assert teacher.shape == (4, 8, 12)
    assert teacher.codec.factors == (1, 2)
    noise, null = normal(3, 4, 8, 12), {name: each[:1].expand_as(each) for name, each in null.items()}
    finite_at_both_ends(teacher, noise[:1])
    for scale in (1.0, 3.0):
        expected = stock_latents(stock, noise, rows, null, scale)
        same(ours(teacher, vp_grid(stock.scheduler), noise, scale), expected)
    if xl:
        fits_students(teacher, noise)


@pytest.mark.long
def test_the_sizes_of_sdxl_can_be_conditions(tmp_path):
    """One sample, because the pipeline confuses the sizes of samples with those of the unconditional call."""
    stock = pipeline(ddim(**SD), xl=True)
    rows, null = ({name: each[:1] for name, each in embeddings(seed, xl=True).items()} for seed in (2, 5))
    sizes = torch.tensor([[64.0, 32, 2, 4, 16, 24]])
    path = write_conditions(
        tmp_path / "conditions.safetensors", rows | {"time_ids": sizes}, null | {"time_ids": sizes / 2}
    )
    teacher, noise = load(write(tmp_path / "sd", stock), size=[16, 24], conditions=path), normal(1, 4, 8, 12)
    expected = stock_latents(
        stock, noise, rows, null, 3.0, original_size=(64, 32), crops_coords_top_left=(2, 4), target_size=(16, 24),
        negative_original_size=(32, 16), negative_crops_coords_top_left=(1, 2), negative_target_size=(8, 12),
    )  # fmt: skip
    same(ours(teacher, vp_grid(stock.scheduler), noise, 3.0), expected)


@pytest.mark.long
@torch.no_grad()
def test_edm_and_latents_of_their_own_mean_equal_the_pipeline(tmp_path):
    """As in Playground 2.5."""
    stock = pipeline(EDMEulerScheduler(sigma_max=20.0), xl=True)
    stock.vae.register_to_config(latents_mean=MEAN, latents_std=STD)
    rows, noise = embeddings(2, xl=True), normal(3, 4, 8, 12)
    path = write_conditions(tmp_path / "conditions.safetensors", rows)
    teacher = load(write(tmp_path / "sd", stock), size=[16, 24], conditions=path)
    latents = stock_latents(stock, noise, rows, rows, 1.0)
    sigmas = stock.scheduler.sigmas.double()
    same(ours(teacher, sigmas / (1 + sigmas), noise), latents)
    pixels = stock_latents(stock, noise, rows, rows, 1.0, output_type="pt")
    same((teacher.codec.decode(latents) / 2 + 0.5).clamp(0, 1), pixels)
    mean, std = (torch.tensor(numbers).reshape(1, 4, 1, 1) for numbers in (MEAN, STD))
    same(teacher.codec.encode(2 * pixels - 1), 0.18 / std * (stock.vae.encode(2 * pixels - 1)[0].mode() - mean))


@pytest.mark.long
@pytest.mark.parametrize(
    ("xl", "zeros", "negative"),
    [(False, True, ""), (False, True, "grey"), (True, True, ""), (True, False, ""), (True, True, "grey")],
)
def test_encoded_prompts_are_those_of_the_pipeline(tmp_path, xl, zeros, negative):
    texts = (tokenizer(), tokenizer(), clip(8 if xl else 16), clip(8, projection=12, seed=1))
    stock, noise = pipeline(ddim(**SD), texts, xl=xl), normal(2, 4, 8, 12)
    if xl:
        stock.register_to_config(force_zeros_for_empty_prompt=zeros)
    teacher = prompted(tmp_path, stock, negative, size=[16, 24])
    assert teacher.conditioning.null_rows["encoder_hidden_states"].any() != (xl and zeros and not negative)
    expected = stock(
        prompt=PROMPTS, negative_prompt=[negative] * 2 if negative else None, height=16, width=24, latents=noise,
        num_inference_steps=STEPS, output_type="latent", guidance_scale=3.0,
    ).images  # fmt: skip
    same(ours(teacher, vp_grid(stock.scheduler), noise, 3.0), expected)


def test_an_oracle_gives_back_its_velocity():
    table = ddim(**SD).alphas_cumprod

    def network(sample, timestep, encoder_hidden_states, added_cond_kwargs, return_dict):
        return (exact_epsilon(sample, timestep, table),)

    field = NetworkField(as_module(network), vp(table), "epsilon", 999.0, call=ARCHITECTURE.call)
    x, t = normal(3, 4, 8, 12), torch.tensor([0.1, 0.5, 0.9])
    noise = exact_epsilon(x, 999 * t, table)
    expected = vp(table).convert(x.double(), noise.double(), t.double(), "epsilon", "velocity")
    assert (field(x, t, embeddings(2, xl=False)) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"in_channels": 9}, "in_channels=9 (as for inpainting), out_channels=4: the network takes an image besides"),
        ({"in_channels": 8}, "in_channels=8 (as for InstructPix2Pix), out_channels=4: the network takes an image"),
        ({"time_cond_proj_dim": 32}, "time_cond_proj_dim=32: the network takes the guidance scale as an input"),
        ({"num_class_embeds": 10}, "num_class_embeds=10: the network takes a class as an input, which is not"),
        ({"class_embed_type": "timestep"}, "class_embed_type=timestep: the network takes a class or a noise level"),
        ({"addition_embed_type": "image"}, "addition_embed_type=image: the network takes more than a prompt, which"),
        ({"encoder_hid_dim": 4}, "encoder_hid_dim=4: the network takes another projection of the embedding"),
        ({"addition_embed_type": "text_time"}, "projection_class_embeddings_input_dim than 6 times that; got None"),
        ({"cross_attention_dim": "wide"}, "cross_attention_dim"),
    ],
)
def test_networks_that_are_called_in_another_way_are_refused(tmp_path, options, said):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_class_name": "UNet2DConditionModel", "sample_size": 8, **options}))
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)


def test_sdxl_has_a_pipeline_and_a_guidance_scale_of_its_own():
    sd, xl = {"in_channels": 4}, {"in_channels": 4, **XL}
    assert (ARCHITECTURE.pipeline_of(sd), ARCHITECTURE.scale_of(sd)) == ("StableDiffusionPipeline", 7.5)
    assert (ARCHITECTURE.pipeline_of(xl), ARCHITECTURE.scale_of(xl)) == ("StableDiffusionXLPipeline", 5.0)
