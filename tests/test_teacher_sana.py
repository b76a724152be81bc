"""Sana as a teacher."""

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from latent import (
    NEGATIVE,
    PROMPTS,
    VOCABULARY,
    conditions,
    edit,
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
from transformers import Gemma2Config, Gemma2Model

from distill.core.errors import InputError
from distill.flow.interpolants import linear
from distill.teachers.architectures.sana import ARCHITECTURE
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher SanaTransformer2DModel")

NOISE = normal(2, 4, 4, 6)


def pipeline(*, timestep_scale: float = 1.0, **parts) -> SanaPipeline:
    network = seeded(
        lambda: SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=12,
            sample_size=4,
            timestep_scale=timestep_scale,
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    given = {"scheduler": scheduler, "vae": None, "text_encoder": None, "tokenizer": None, "transformer": network}
    found = SanaPipeline(**(given | parts))
    found.set_progress_bar_config(disable=True)
    return found


def embeddings(count: int, seed: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(count, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    return {"encoder_hidden_states": normal(count, 7, 12, seed=seed), "encoder_attention_mask": mask}


ROWS, NULL = embeddings(2, 2), embeddings(1, 3)


def theirs(stock, scale, output_type="latent"):
    return stock(
        height=128, width=192, num_inference_steps=4, output_type=output_type, guidance_scale=scale, latents=NOISE,
        use_resolution_binning=False, negative_prompt=None, prompt_embeds=ROWS["encoder_hidden_states"],
        prompt_attention_mask=ROWS["encoder_attention_mask"],
        negative_prompt_embeds=NULL["encoder_hidden_states"].expand(2, -1, -1),
        negative_prompt_attention_mask=NULL["encoder_attention_mask"].expand(2, -1),
    ).images  # fmt: skip


@pytest.mark.parametrize("timestep_scale", [1.0, 0.001])
def test_equals_the_pipeline(tmp_path, timestep_scale):
    stock = pipeline(timestep_scale=timestep_scale)
    path = write_conditions(tmp_path / "conditions.safetensors", ROWS, NULL)
    folder = write(tmp_path / "sana", stock)
    teacher = load(folder, size=[128, 192], conditions=path)
    assert teacher.shape == (4, 4, 6)
    for scale in (1.0, 4.5):
        expected = theirs(stock, scale)
        same(ours(teacher, stock.scheduler.sigmas, NOISE, scale), expected)
    finite_at_both_ends(teacher, NOISE)
    fits_students(teacher, NOISE)


def test_the_stock_scheduler_describes_the_same_field(tmp_path):
    path = write_conditions(tmp_path / "conditions.safetensors", ROWS)
    folder, t = write(tmp_path / "sana", pipeline()), torch.tensor([0.3, 0.9])
    euler = load(folder, conditions=path, size=[128, 192])
    stock = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    stock.save_pretrained(folder / "scheduler")
    solver = load(folder, conditions=path, size=[128, 192])
    assert euler.digest != solver.digest
    assert torch.equal(*(each.field(NOISE, t, conditions(each, 2)) for each in (euler, solver)))


def test_an_oracle_gives_back_its_velocity():
    class Stub(torch.nn.Module):
        config = {"timestep_scale": 0.5}

        def __call__(self, x_t, *, timestep, **others):
            return (exact(x_t, timestep / 500),)

    field = NetworkField(Stub(), linear(), "velocity", 1000.0, call=ARCHITECTURE.call)
    t = torch.tensor([0.1, 0.9])
    assert (field(NOISE, t, ROWS) - exact(NOISE, t)).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance_embeds": True}, r"guidance_embeds=true: this network was distilled \(Sana Sprint\)"),
        ({"out_channels": 64}, "in_channels=32, out_channels=64; valid: equal numbers"),
    ],
)
def test_networks_that_are_called_in_another_way_are_refused(tmp_path, changes, said):
    (tmp_path / "config.json").write_text('{"_class_name": "SanaTransformer2DModel"}')
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(InputError, match=said):
        load(tmp_path, prediction="velocity")


@pytest.mark.long
def test_encodes_prompts_as_the_pipeline(tmp_path):
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=6,
    )  # fmt: skip
    stock = pipeline(text_encoder=seeded(lambda: Gemma2Model(config)), tokenizer=tokenizer(4096))
    teacher = prompted(tmp_path, stock, size=[128, 192])
    mask = teacher.conditioning.rows.take(torch.arange(2))["encoder_attention_mask"]
    assert mask.shape == (2, 300) and mask[1].sum() - mask[0].sum() == len(PROMPTS[1]) - len(PROMPTS[0])
    assert teacher.conditioning.null_rows["encoder_attention_mask"].sum() == len(NEGATIVE) + 1
    expected = stock(
        prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, height=128, width=192, num_inference_steps=2,
        output_type="latent", guidance_scale=4.5, latents=NOISE, use_resolution_binning=False,
    ).images  # fmt: skip
    same(ours(teacher, stock.scheduler.sigmas, NOISE, 4.5), expected)


@pytest.mark.long
def test_encodes_and_decodes_images_as_the_pipeline(tmp_path):
    levels = {"block_out_channels": (4, 4, 4, 4, 4, 8), "block_types": "ResBlock", "layers_per_block": (1,) * 6}
    vae = seeded(
        lambda: AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            scaling_factor=0.41,
            encoder_qkv_multiscales=((),) * 6,
            decoder_qkv_multiscales=((),) * 6,
            decoder_norm_types="rms_norm",
            **{f"{part}_{name}": value for name, value in levels.items() for part in ("encoder", "decoder")},
        )
    )
    stock = pipeline(vae=vae)
    path = write_conditions(tmp_path / "conditions.safetensors", ROWS, NULL)
    teacher = load(write(tmp_path / "sana", stock), size=[128, 192], conditions=path)
    assert teacher.codec.factors == (1, 32)
    assert teacher.codec.shape((3, 128, 192)) == teacher.shape == (4, 4, 6)
    images = normal(2, 3, 128, 192, seed=5).clamp(-1, 1)
    with torch.no_grad():
        same(teacher.codec.encode(images), vae.encode(images).latent * 0.41, 1e-6)
    same(teacher.codec.decode(theirs(stock, 1.0)).clamp(-1, 1) / 2 + 0.5, theirs(stock, 1.0, "pt"), 1e-6)
