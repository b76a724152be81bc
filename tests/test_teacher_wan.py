"""Wan as a teacher."""

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from latent import (
    NEGATIVE,
    PROMPTS,
    VOCABULARY,
    as_module,
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
from transformers import UMT5Config, UMT5EncoderModel

from distill.core.errors import InputError
from distill.flow.interpolants import linear
from distill.networks.experts import Experts
from distill.spec.guidancespec import FieldSettings, GuidanceSpec
from distill.teachers.architectures.wan import ARCHITECTURE
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher WanTransformer3DModel")

SIZE = [5, 16, 32]  # frames, height, width
STEPS = 4
ROWS, NULL = normal(2, 7, 16, seed=2), normal(1, 7, 16, seed=3)
NOISE = normal(2, 4, 2, 2, 4)


def network(seed: int = 0, **config) -> WanTransformer3DModel:
    tiny = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
        "freq_dim": 16, "ffn_dim": 24, "num_layers": 1, "rope_max_seq_len": 16,
    }  # fmt: skip
    return seeded(lambda: WanTransformer3DModel(**(tiny | config)), seed)


def pipeline(**parts) -> WanPipeline:
    given = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "transformer": network()}
    found = WanPipeline(**(dict.fromkeys(("tokenizer", "text_encoder", "vae")) | given | parts))
    found.set_progress_bar_config(disable=True)
    return found


def load_with_prompts(folder, stock, **fields):
    path = write_conditions(
        folder / "conditions.safetensors", {"encoder_hidden_states": ROWS}, {"encoder_hidden_states": NULL}
    )
    return load(write(folder / "wan", stock), conditions=path, **({"size": SIZE} | fields))


def theirs(stock, scale, scale_2=None):
    return stock(
        num_frames=SIZE[0], height=SIZE[1], width=SIZE[2], num_inference_steps=STEPS, output_type="latent",
        guidance_scale=scale, guidance_scale_2=scale_2, latents=NOISE, prompt_embeds=ROWS,
        negative_prompt_embeds=NULL.expand(2, -1, -1),
    ).frames  # fmt: skip


@pytest.mark.parametrize("expand_timesteps", [False, True], ids=["Wan 2.1", "Wan 2.2 TI2V"])
def test_equals_the_pipeline(tmp_path, expand_timesteps):
    stock = pipeline(expand_timesteps=expand_timesteps)
    teacher = load_with_prompts(tmp_path, stock)
    assert teacher.shape == (4, 2, 2, 4)
    for scale in (1.0, 5.0):
        expected = theirs(stock, scale)
        same(ours(teacher, stock.scheduler.sigmas, NOISE, scale), expected)
    finite_at_both_ends(teacher, NOISE)
    with pytest.raises(InputError, match=r"guidance_scale_2: 3 has no effect, because .* is one network; remove it"):
        teacher.field_with(FieldSettings(4.0, GuidanceSpec(guidance_scale_2=3.0)))
    fits_students(teacher, NOISE)


def test_two_networks_equal_the_pipeline(tmp_path):
    stock = pipeline(transformer_2=network(1), boundary_ratio=0.875)
    teacher = load_with_prompts(tmp_path, stock)
    assert isinstance(teacher.network, Experts) and teacher.boundary == 0.875
    finite_at_both_ends(teacher, NOISE)
    with pytest.raises(InputError, match="has no layer blocks.0; valid: none, because it has two networks"):
        teacher.features(NOISE, torch.full((2,), 0.5), {}, ["blocks.0"])
    for scale, scale_2 in ((1.0, None), (4.0, None), (4.0, 3.0)):
        expected = theirs(stock, scale, scale_2)
        sigmas = stock.scheduler.sigmas
        assert 1 <= (sigmas >= 0.875).sum() < STEPS, "both networks are called"
        same(ours(teacher, sigmas, NOISE, scale, GuidanceSpec(guidance_scale_2=scale_2)), expected)


def test_the_stock_scheduler_describes_the_same_field(tmp_path):
    euler, t = load_with_prompts(tmp_path, pipeline()), torch.tensor([0.3, 0.9])
    stock = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    stock.save_pretrained(tmp_path / "wan" / "scheduler")
    unipc = load(tmp_path / "wan", size=SIZE, conditions=str(tmp_path / "conditions.safetensors"))
    assert euler.digest != unipc.digest
    assert torch.equal(*(each.field(NOISE, t, conditions(each, 2)) for each in (euler, unipc)))


def test_bfloat16_keeps_the_modules_in_float32_that_diffusers_keeps(tmp_path):
    teacher = load_with_prompts(tmp_path, pipeline(), dtype="bfloat16")
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "wan" / "transformer", torch_dtype=torch.bfloat16)
    dtypes = {name: each.dtype for name, each in stock.named_parameters()}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    assert {name: each.dtype for name, each in teacher.network.named_parameters()} == dtypes
    t, rows = torch.tensor([0.3, 0.9]), ROWS.bfloat16()
    with torch.no_grad():
        expected = stock(NOISE.bfloat16(), 1000 * t, rows, return_dict=False)[0]
        assert torch.equal(teacher.field(NOISE, t, conditions(teacher, 2)), expected.float())


def test_an_oracle_gives_back_its_velocity():
    def stub(*, hidden_states, timestep, encoder_hidden_states, return_dict):
        return (exact(hidden_states, timestep / 1000),)

    field = NetworkField(as_module(stub), linear(), "velocity", 1000.0, call=ARCHITECTURE.call)
    t = torch.tensor([0.1, 0.9])
    assert (field(NOISE, t, {"encoder_hidden_states": ROWS}) - exact(NOISE, t)).abs().max() <= 1e-6


def test_networks_that_are_called_in_another_way_are_refused(tmp_path):
    folder, stock = tmp_path / "wan", pipeline()
    write(folder, stock)
    for changes, said in (
        ({"in_channels": 9}, "in_channels=9, out_channels=4, image_dim=None: this network is also conditioned on an"),
        ({"image_dim": 8}, "image_dim=8: this network is also conditioned on an image"),
        ({"patch_size": [1, 4, 4]}, r"patch_size=\[1, 4, 4\]; valid: \[1, 2, 2\]"),
    ):
        stock.transformer.save_config(folder / "transformer")
        edit(folder / "transformer" / "config.json", **changes)
        with pytest.raises(InputError, match=said):
            load(folder)
    edit(folder / "model_index.json", _class_name="WanImageToVideoPipeline")
    with pytest.raises(InputError, match="is a WanImageToVideoPipeline, which is not supported"):
        load(folder)


@pytest.mark.long
def test_encodes_prompts_as_the_pipeline(tmp_path):
    config = UMT5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    stock = pipeline(text_encoder=seeded(lambda: UMT5EncoderModel(config)), tokenizer=tokenizer(512))
    teacher = prompted(tmp_path, stock, size=SIZE)
    rows = teacher.conditioning.rows.take(torch.arange(2))["encoder_hidden_states"]
    assert rows.shape == (2, 512, 16) and not rows[:, 100:].any()
    expected = stock(
        prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, num_frames=SIZE[0], height=SIZE[1], width=SIZE[2],
        num_inference_steps=2, output_type="latent", guidance_scale=4.0, latents=NOISE,
    ).frames  # fmt: skip
    same(ours(teacher, stock.scheduler.sigmas, NOISE, 4.0), expected)


@pytest.mark.long
@pytest.mark.parametrize("patch_size", [None, 2], ids=["2.1", "2.2"])
def test_encodes_and_decodes_videos_as_the_pipeline(tmp_path, patch_size):
    channels = 3 * (patch_size or 1) ** 2
    vae = seeded(
        lambda: AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, in_channels=channels, out_channels=channels,
            latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.5, 0.5, 2.0, 1.0], patch_size=patch_size,
            scale_factor_spatial=8 * (patch_size or 1), is_residual=patch_size is not None,
        )
    )  # fmt: skip
    factor = vae.config.scale_factor_spatial
    stock = pipeline(vae=vae)
    teacher = load_with_prompts(tmp_path, stock, size=[5, 2 * factor, 4 * factor])
    assert teacher.codec.factors == (4, factor) and teacher.shape == (4, 2, 2, 4)
    assert teacher.codec.shape((3, 5, 2 * factor, 4 * factor)) == teacher.shape
    video = normal(2, 3, 5, 2 * factor, 4 * factor, seed=5).clamp(-1, 1)
    mean, std = (torch.tensor(vae.config[name]).reshape(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        expected = (vae.encode(video).latent_dist.mode() - mean) / std
    latents = teacher.codec.encode(video)
    same(latents, expected, 1e-6)
    assert latents.shape[1:] == teacher.shape

    def run(output_type):
        return stock(
            num_frames=5, height=2 * factor, width=4 * factor, num_inference_steps=1, guidance_scale=1.0,
            latents=NOISE, prompt_embeds=ROWS, output_type=output_type,
        ).frames  # fmt: skip

    decoded = teacher.codec.decode(run("latent"))
    same(decoded.transpose(1, 2) / 2 + 0.5, run("pt"), 1e-6)
