"""CogView4 as a teacher."""

import pytest
import torch
from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from latent import (
    NEGATIVE,
    PROMPTS,
    VOCABULARY,
    autoencoder,
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
from transformers import GlmConfig, GlmModel

from distill.core.errors import InputError
from distill.flow.interpolants import linear
from distill.teachers.architectures.cogview4 import ARCHITECTURE
from distill.teachers.convention import Asked
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher CogView4Transformer2DModel")


def pipeline(*, texts: dict | None = None) -> CogView4Pipeline:
    network = seeded(
        lambda: CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            text_embed_dim=24,
            time_embed_dim=16,
            condition_dim=8,
            sample_size=8,
        )
    )
    texts = texts or {"text_encoder": None, "tokenizer": None}
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75
    )
    found = CogView4Pipeline(vae=autoencoder(), transformer=network, scheduler=scheduler, **texts)
    found.set_progress_bar_config(disable=True)
    return found


LENGTHS = [16, 32, 16]


def embeddings(seed: int) -> dict[str, torch.Tensor]:
    """Three prompts of different lengths. What lies in their padding must not matter."""
    mask = torch.arange(32) < torch.tensor(LENGTHS)[:, None]
    return {"encoder_hidden_states": normal(3, 32, 24, seed=seed), "attention_mask": mask}


def test_equals_the_pipeline(tmp_path):
    stock = pipeline()
    rows, null = embeddings(2), {name: each[:1] for name, each in embeddings(5).items()}
    path = write_conditions(tmp_path / "conditions.safetensors", rows, null)
    teacher = load(write(tmp_path / "cogview4", stock), size=[32, 48], conditions=path)
    assert teacher.shape == (4, 16, 24)
    noise = normal(3, 4, 16, 24)
    finite_at_both_ends(teacher, noise)
    for scale in (1.0, 3.0):
        expected = torch.cat(
            [
                stock(
                    height=32, width=48, num_inference_steps=4, output_type="latent", guidance_scale=scale,
                    latents=noise[i : i + 1], prompt_embeds=rows["encoder_hidden_states"][i : i + 1, : LENGTHS[i]],
                    negative_prompt_embeds=null["encoder_hidden_states"][:, : LENGTHS[0]],
                ).images
                for i in range(3)
            ]
        )  # fmt: skip
        same(ours(teacher, stock.scheduler.sigmas, noise, scale), expected)
    fits_students(teacher, noise)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base_shift": 0.5}, "base_shift=0.5; valid for CogView4: 0.25, because the times with which its pipeline"),
        ({"max_shift": 1.15}, "max_shift=1.15; valid for CogView4: 0.75"),
        ({"use_dynamic_shifting": False}, "use_dynamic_shifting=False; valid for CogView4: True"),
        ({"time_shift_type": "exponential"}, "time_shift_type='exponential'; valid for CogView4: 'linear'"),
        ({"num_train_timesteps": 500}, "num_train_timesteps=500; valid for CogView4: 1000"),
    ],
)
def test_schedulers_with_another_time_shift_are_refused(tmp_path, options, said):
    edit(write(tmp_path / "cogview4", pipeline()) / "scheduler" / "scheduler_config.json", **options)
    with pytest.raises(InputError) as error:
        load(tmp_path / "cogview4")
    assert said in str(error.value)


def test_an_oracle_gives_back_its_velocity():
    class Oracle(torch.nn.Module):
        config = {"patch_size": 2}

        def __call__(self, *, hidden_states, timestep, **others):
            mu = 0.25 + 0.75 * (8 * 12 / 4 / 256) ** 0.5
            return (exact(hidden_states, mu / (mu + 1000 / timestep.double() - 1)),)

    field = NetworkField(Oracle(), linear(), "velocity", 1000.0, call=ARCHITECTURE.call)
    x, t = normal(3, 4, 8, 12), torch.tensor([0.1, 0.5, 0.9])
    sizes = ARCHITECTURE.constants({}, Asked((64, 96)))
    cond = embeddings(2) | {name: each.expand(3, -1) for name, each in sizes.items()}
    assert (field(x, t, cond) - exact(x, t)).abs().max() <= 1e-6


@pytest.mark.long
def test_encodes_prompts_as_the_pipeline(tmp_path):
    config = GlmConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        pad_token_id=0,
    )
    texts = {"text_encoder": seeded(lambda: GlmModel(config)), "tokenizer": tokenizer(2048, "left")}
    stock = pipeline(texts=texts)
    teacher, noise = prompted(tmp_path, stock, size=[32, 48]), normal(2, 4, 16, 24)
    mask = teacher.conditioning.rows.take(torch.arange(2))["attention_mask"]
    assert mask.shape == (2, 32)
    assert mask.sum(1).tolist() == [16, 32]
    expected = torch.cat(
        [
            stock(
                prompt=[prompt], negative_prompt=[NEGATIVE], height=32, width=48, num_inference_steps=2,
                output_type="latent", guidance_scale=3.0, latents=noise[i : i + 1],
            ).images
            for i, prompt in enumerate(PROMPTS)
        ]
    )  # fmt: skip
    same(ours(teacher, stock.scheduler.sigmas, noise, 3.0), expected, within=1e-5)
