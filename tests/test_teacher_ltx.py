"""LTX-Video as a teacher."""

import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
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
from transformers import T5Config, T5EncoderModel

from distill.core.errors import InputError
from distill.flow.interpolants import linear
from distill.teachers.architectures.ltx import ARCHITECTURE
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher LTXVideoTransformer3DModel")

SIZE = [17, 64, 96]  # frames, height, width
NOISE = normal(2, 4, 3, 2, 3)


def pipeline(**parts) -> LTXPipeline:
    network = seeded(
        lambda: LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=2,
            caption_channels=16,
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    given = {"scheduler": scheduler, "vae": None, "text_encoder": None, "tokenizer": None, "transformer": network}
    found = LTXPipeline(**(given | parts))
    found.set_progress_bar_config(disable=True)
    return found


def embeddings(count: int, seed: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(count, 7, dtype=torch.bool)
    mask[0, 4:] = False
    return {"encoder_hidden_states": normal(count, 7, 16, seed=seed), "encoder_attention_mask": mask}


ROWS, NULL = embeddings(2, 2), embeddings(1, 3)


def theirs(stock, scale, size, noise, output_type="latent", frame_rate=25, steps=3):
    found = stock(
        num_frames=size[0], height=size[1], width=size[2], num_inference_steps=steps, output_type=output_type,
        guidance_scale=scale, latents=stock._pack_latents(noise), frame_rate=frame_rate,
        prompt_embeds=ROWS["encoder_hidden_states"], prompt_attention_mask=ROWS["encoder_attention_mask"],
        negative_prompt_embeds=NULL["encoder_hidden_states"].expand(2, -1, -1),
        negative_prompt_attention_mask=NULL["encoder_attention_mask"].expand(2, -1),
    ).frames  # fmt: skip
    return stock._unpack_latents(found, *noise.shape[2:]) if output_type == "latent" else found


def test_equals_the_pipeline(tmp_path):
    stock = pipeline()
    path = write_conditions(tmp_path / "conditions.safetensors", ROWS, NULL)
    teacher = load(write(tmp_path / "ltx", stock), size=SIZE, conditions=path)
    assert teacher.shape == (4, 3, 2, 3)
    for scale in (1.0, 3.0):
        expected = theirs(stock, scale, SIZE, NOISE)
        same(ours(teacher, stock.scheduler.sigmas, NOISE, scale), expected)
    finite_at_both_ends(teacher, NOISE)
    fits_students(teacher, NOISE)


def test_conditions_may_have_a_frame_rate(tmp_path):
    stock = pipeline()
    rows = ROWS | {"frame_rate": torch.tensor([12.0, 12.0])}
    path = write_conditions(tmp_path / "conditions.safetensors", rows)
    teacher = load(write(tmp_path / "ltx", stock), size=SIZE, conditions=path)
    expected = theirs(stock, 1.0, SIZE, NOISE, frame_rate=12)
    same(ours(teacher, stock.scheduler.sigmas, NOISE), expected)
    assert (theirs(stock, 1.0, SIZE, NOISE) - expected).abs().max() > 1e-3


def test_an_oracle_gives_back_its_velocity():
    def stub(*, hidden_states, timestep, **others):
        x = LTXPipeline._unpack_latents(hidden_states, 3, 2, 3)
        return (LTXPipeline._pack_latents(exact(x, timestep / 1000)),)

    field = NetworkField(as_module(stub), linear(), "velocity", 1000.0, call=ARCHITECTURE.call)
    t = torch.tensor([0.1, 0.9])
    cond = ROWS | {"frame_rate": torch.full((2,), 25.0), "video_size": torch.tensor([SIZE, SIZE])}
    assert (field(NOISE, t, cond) - exact(NOISE, t)).abs().max() <= 1e-6


def test_patches_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "LTXVideoTransformer3DModel"}')
    edit(tmp_path / "config.json", patch_size=2)
    with pytest.raises(InputError, match="patch_size=2, patch_size_t=1; valid: 1 and 1"):
        load(tmp_path, prediction="velocity")


@pytest.mark.long
def test_encodes_prompts_as_the_pipeline(tmp_path):
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    stock = pipeline(text_encoder=seeded(lambda: T5EncoderModel(config)), tokenizer=tokenizer(128))
    teacher = prompted(tmp_path, stock, size=SIZE)
    mask = teacher.conditioning.rows.take(torch.arange(2))["encoder_attention_mask"]
    assert mask.shape == (2, 128) and mask.sum(1).tolist() == [len(each) + 1 for each in PROMPTS]
    found = stock(
        prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, num_frames=SIZE[0], height=SIZE[1], width=SIZE[2],
        num_inference_steps=2, output_type="latent", guidance_scale=3.0, latents=stock._pack_latents(NOISE),
    ).frames  # fmt: skip
    same(ours(teacher, stock.scheduler.sigmas, NOISE, 3.0), stock._unpack_latents(found, 3, 2, 3))


def autoencoder(**options) -> AutoencoderKLLTXVideo:
    tiny = {
        "latent_channels": 4, "block_out_channels": (8, 8), "down_block_types": ("LTXVideoDownBlock3D",) * 2,
        "decoder_block_out_channels": (8, 8), "layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1),
        "spatio_temporal_scaling": (True, False), "decoder_spatio_temporal_scaling": (True, False),
        "decoder_inject_noise": (False,) * 3, "downsample_type": ("conv",) * 2, "upsample_residual": (False,) * 2,
        "upsample_factor": (1, 1), "scaling_factor": 0.8,
    }  # fmt: skip
    vae = seeded(lambda: AutoencoderKLLTXVideo(**(tiny | options)))
    vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.4]))
    vae.latents_std.copy_(torch.tensor([1.5, 0.5, 2.0, 1.0]))
    return vae


@pytest.mark.long
@pytest.mark.parametrize("timestep_conditioning", [False, True], ids=["0.9.0", "0.9.1"])
def test_encodes_and_decodes_videos_as_the_pipeline(tmp_path, timestep_conditioning):
    vae = autoencoder(timestep_conditioning=timestep_conditioning)
    stock, size, noise = pipeline(vae=vae), [5, 32, 64], normal(2, 4, 3, 4, 8)
    path = write_conditions(tmp_path / "conditions.safetensors", ROWS, NULL)
    teacher = load(write(tmp_path / "ltx", stock), size=size, conditions=path)
    assert teacher.codec.factors == (2, 8)
    assert teacher.codec.shape((3, *size)) == teacher.shape == (4, 3, 4, 8)
    latents = theirs(stock, 1.0, size, noise)
    same(ours(teacher, stock.scheduler.sigmas, noise), latents)
    same(teacher.codec.decode(latents).transpose(1, 2).clamp(-1, 1) / 2 + 0.5, theirs(stock, 1.0, size, noise, "pt"))
    video = normal(2, 3, *size, seed=5).clamp(-1, 1)
    with torch.no_grad():
        z = vae.encode(video).latent_dist.mode()
        expected = stock._normalize_latents(z, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    same(teacher.codec.encode(video), expected, 1e-6)


@pytest.mark.long
def test_an_autoencoder_may_state_its_factors(tmp_path):
    """As in LTX 0.9.5, where not every level halves all sides."""
    vae = autoencoder(
        block_out_channels=(8, 16, 16), down_block_types=("LTXVideo095DownBlock3D",) * 2, layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True), downsample_type=("spatial", "temporal"), spatial_compression_ratio=8,
        temporal_compression_ratio=2,
    )  # fmt: skip
    stock = pipeline(vae=vae)
    teacher = load(write(tmp_path / "ltx", stock), size=[5, 32, 64], conditions=write_conditions(tmp_path / "c", ROWS))
    assert teacher.codec.factors == (2, 8)
    assert teacher.codec.encode(normal(1, 3, 5, 32, 64)).shape == (1, 4, 3, 4, 8) == (1, *teacher.shape)
