"""Qwen-Image as a teacher."""

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
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
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from distill.core.errors import InputError
from distill.flow.interpolants import linear
from distill.teachers.architectures.qwen_image import ARCHITECTURE
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher QwenImageTransformer2DModel")

STEPS = 3
NOISE = normal(3, 4, 4, 8)


def pipeline(**parts) -> QwenImagePipeline:
    network = seeded(
        lambda: QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    given = {"scheduler": scheduler, "vae": None, "text_encoder": None, "tokenizer": None, "transformer": network}
    found = QwenImagePipeline(**(given | parts))
    found.set_progress_bar_config(disable=True)
    return found


def embeddings(count: int, seed: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(count, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    return {"encoder_hidden_states": normal(count, 7, 24, seed=seed), "encoder_hidden_states_mask": mask}


def test_equals_the_pipeline(tmp_path):
    stock, rows, null = pipeline(), embeddings(3, 2), embeddings(1, 3)
    path = write_conditions(tmp_path / "conditions.safetensors", rows, null)
    teacher = load(write(tmp_path / "qwen", stock), size=[32, 64], conditions=path)
    assert teacher.shape == (4, 4, 8)
    for scale in (1.0, 4.0):
        found = stock(
            height=32, width=64, num_inference_steps=STEPS, output_type="latent", true_cfg_scale=scale,
            latents=stock._pack_latents(NOISE, 3, 4, 4, 8), prompt_embeds=rows["encoder_hidden_states"],
            prompt_embeds_mask=rows["encoder_hidden_states_mask"],
            negative_prompt_embeds=null["encoder_hidden_states"].expand(3, -1, -1),
            negative_prompt_embeds_mask=null["encoder_hidden_states_mask"].expand(3, -1),
        ).images  # fmt: skip
        expected = stock._unpack_latents(found, 32, 64, 8)[:, :, 0]
        same(ours(teacher, stock.scheduler.sigmas, NOISE, scale), expected)
    finite_at_both_ends(teacher, NOISE)
    fits_students(teacher, NOISE)


def test_an_oracle_gives_back_its_velocity():
    def stub(*, hidden_states, timestep, img_shapes, **others):
        assert img_shapes == [[(1, 2, 4)]] * 3
        x = QwenImagePipeline._unpack_latents(hidden_states, 32, 64, 8)[:, :, 0]
        return (QwenImagePipeline._pack_latents(exact(x, timestep), 3, 4, 4, 8),)

    field = NetworkField(as_module(stub), linear(), "velocity", 1000.0, call=ARCHITECTURE.call)
    t = torch.tensor([0.1, 0.5, 0.9])
    assert (field(NOISE, t, embeddings(3, 2)) - exact(NOISE, t)).abs().max() <= 1e-6


def test_guidance_without_difference_changes_nothing():
    v, t = normal(2, 4, 4, 8, seed=5), torch.tensor([0.1, 0.9])
    for other in (v, torch.zeros_like(v)):
        assert torch.allclose(ARCHITECTURE.combine(NOISE[:2], t, v, other, 4.0), v, atol=1e-6)
    assert not ARCHITECTURE.combine(NOISE[:2], t, 0 * v, 0 * v, 4.0).any()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("guidance_embeds", "guidance_embeds=true is not supported, because diffusers cannot call such a network"),
        ("zero_cond_t", "zero_cond_t=true: this network is also conditioned on images"),
        ("use_layer3d_rope", "use_layer3d_rope=true: this network is also conditioned on images"),
    ],
)
def test_networks_of_other_pipelines_are_refused(tmp_path, option, said):
    (tmp_path / "config.json").write_text('{"_class_name": "QwenImageTransformer2DModel"}')
    edit(tmp_path / "config.json", **{option: True})
    with pytest.raises(InputError, match=said):
        load(tmp_path, prediction="velocity")


@pytest.mark.long
def test_encodes_prompts_as_the_pipeline(tmp_path):
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 24}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    stock = pipeline(text_encoder=seeded(lambda: Qwen2_5_VLForConditionalGeneration(config)), tokenizer=tokenizer(1024))
    teacher = prompted(tmp_path, stock, size=[32, 64])
    mask = teacher.conditioning.rows.take(torch.arange(2))["encoder_hidden_states_mask"]
    assert mask.shape == (2, mask[1].sum())
    assert (mask[1].sum() - mask[0].sum()).item() == len(PROMPTS[1]) - len(PROMPTS[0])
    noise = NOISE[:2]
    found = stock(
        prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, height=32, width=64, num_inference_steps=2,
        output_type="latent", true_cfg_scale=4.0, latents=stock._pack_latents(noise, 2, 4, 4, 8),
    ).images  # fmt: skip
    expected = stock._unpack_latents(found, 32, 64, 8)[:, :, 0]
    same(ours(teacher, stock.scheduler.sigmas, noise, 4.0), expected)
    assert ARCHITECTURE.encode(stock, ["a cat"])["encoder_hidden_states_mask"].sum() == mask[0].sum()


@pytest.mark.long
def test_encodes_and_decodes_images_as_the_pipeline(tmp_path):
    vae = seeded(
        lambda: AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.4],
            latents_std=[1.5, 0.5, 2.0, 1.0],
        )
    )  # fmt: skip
    stock, rows = pipeline(vae=vae), embeddings(3, 2)
    path = write_conditions(tmp_path / "conditions.safetensors", rows)
    teacher = load(write(tmp_path / "qwen", stock), size=[32, 64], conditions=path)
    assert teacher.codec.factors == (4, 8)
    assert teacher.codec.shape((3, 32, 64)) == teacher.shape == (4, 4, 8)
    images = normal(2, 3, 32, 64, seed=5).clamp(-1, 1)
    mean, std = (torch.tensor(vae.config[name]).reshape(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        expected = (vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
    same(teacher.codec.encode(images), expected, 1e-6)

    def run(output_type):
        return stock(
            height=32, width=64, num_inference_steps=2, latents=stock._pack_latents(NOISE, 3, 4, 4, 8),
            prompt_embeds=rows["encoder_hidden_states"], prompt_embeds_mask=rows["encoder_hidden_states_mask"],
            output_type=output_type,
        ).images  # fmt: skip

    latents = stock._unpack_latents(run("latent"), 32, 64, 8)[:, :, 0]
    same(teacher.codec.decode(latents) / 2 + 0.5, run("pt"), 1e-6)
