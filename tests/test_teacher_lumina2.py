"""Lumina-Image 2.0 as a teacher."""

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from latent import (
    NEGATIVE,
    PROMPTS,
    VOCABULARY,
    as_module,
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
from distill.spec.guidancespec import GuidanceSpec
from distill.teachers.architectures.lumina2 import ARCHITECTURE
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher Lumina2Transformer2DModel")

NOISE = normal(2, 4, 4, 8)


def pipeline(**parts) -> Lumina2Pipeline:
    network = seeded(
        lambda: Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(300, 16, 16),
            cap_feat_dim=16,
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    given = {"scheduler": scheduler, "vae": None, "text_encoder": None, "tokenizer": None, "transformer": network}
    found = Lumina2Pipeline(**(given | parts))
    found.set_progress_bar_config(disable=True)
    return found


def embeddings(count: int, seed: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(count, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    return {"encoder_hidden_states": normal(count, 7, 16, seed=seed), "encoder_attention_mask": mask}


def test_equals_the_pipeline(tmp_path):
    stock, rows, null = pipeline(), embeddings(2, 2), embeddings(1, 3)
    path = write_conditions(tmp_path / "conditions.safetensors", rows, null)
    folder = write(tmp_path / "lumina", stock)
    assert load(folder, conditions=path).shape == (4, 4, 4)
    teacher = load(folder, size=[32, 64], conditions=path)
    assert teacher.shape == (4, 4, 8)
    for scale, truncated in ((1.0, 1.0), (4.0, 1.0), (4.0, 0.5)):
        expected = stock(
            height=32, width=64, num_inference_steps=4, output_type="latent", guidance_scale=scale, latents=NOISE,
            cfg_trunc_ratio=truncated, prompt_embeds=rows["encoder_hidden_states"],
            prompt_attention_mask=rows["encoder_attention_mask"],
            negative_prompt_embeds=null["encoder_hidden_states"].expand(2, -1, -1),
            negative_prompt_attention_mask=null["encoder_attention_mask"].expand(2, -1),
        ).images  # fmt: skip
        sigmas = stock.scheduler.sigmas
        guidance = None if truncated == 1 else GuidanceSpec(interval=(sigmas[2].item(), 1.0))
        same(ours(teacher, sigmas, NOISE, scale, guidance), expected)
    finite_at_both_ends(teacher, NOISE)
    fits_students(teacher, NOISE)


def test_schedulers_with_another_scale_of_time_are_refused(tmp_path):
    edit(write(tmp_path / "lumina", pipeline()) / "scheduler" / "scheduler_config.json", num_train_timesteps=1)
    with pytest.raises(InputError, match="num_train_timesteps=1; valid for Lumina-Image 2.0: 1000, because the times"):
        load(tmp_path / "lumina")


def test_an_oracle_gives_back_its_velocity():
    def stub(*, hidden_states, timestep, **others):
        return (-exact(hidden_states, 1 - timestep),)

    field = NetworkField(as_module(stub), linear(), "velocity", 1000.0, call=ARCHITECTURE.call)
    t = torch.tensor([0.1, 0.9])
    assert (field(NOISE, t, embeddings(2, 2)) - exact(NOISE, t)).abs().max() <= 1e-6


@pytest.mark.long
def test_encodes_prompts_as_the_pipeline(tmp_path):
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    stock = pipeline(text_encoder=seeded(lambda: Gemma2Model(config)), tokenizer=tokenizer(300))
    teacher = prompted(tmp_path, stock, size=[32, 64])
    mask = teacher.conditioning.rows.take(torch.arange(2))["encoder_attention_mask"]
    system = len(stock.system_prompt + " <Prompt Start> ") + 1
    assert mask.shape == (2, 256) and mask.sum(1).tolist() == [system + len(each) for each in PROMPTS]
    assert teacher.conditioning.null_rows["encoder_attention_mask"].sum() == len(NEGATIVE) + 1
    expected = stock(
        prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, height=32, width=64, num_inference_steps=2,
        output_type="latent", guidance_scale=4.0, latents=NOISE,
    ).images  # fmt: skip
    same(ours(teacher, stock.scheduler.sigmas, NOISE, 4.0), expected)


@pytest.mark.long
def test_decodes_images_as_the_pipeline(tmp_path):
    vae = seeded(
        lambda: AutoencoderKL(
            block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=2, scaling_factor=0.36,
            shift_factor=0.12,
        )
    )  # fmt: skip
    stock, rows = pipeline(vae=vae), embeddings(2, 2)
    path = write_conditions(tmp_path / "conditions.safetensors", rows)
    teacher = load(write(tmp_path / "lumina", stock), size=[32, 64], conditions=path)

    def run(output_type):
        return stock(
            height=32, width=64, num_inference_steps=2, output_type=output_type, guidance_scale=1.0, latents=NOISE,
            prompt_embeds=rows["encoder_hidden_states"], prompt_attention_mask=rows["encoder_attention_mask"],
        ).images  # fmt: skip

    same(teacher.codec.decode(run("latent")).clamp(-1, 1) / 2 + 0.5, run("pt"), 1e-6)
