"""Z-Image as a teacher."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
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
from transformers import Qwen3Config, Qwen3Model

from distill.core.errors import InputError
from distill.flow.interpolants import linear
from distill.teachers.architectures.z_image import ARCHITECTURE
from distill.teachers.network_field import NetworkField

pytestmark = pytest.mark.costs("teacher ZImageTransformer2DModel")

NOISE = normal(2, 4, 4, 8)


def pipeline(**parts) -> ZImagePipeline:
    network = seeded(
        lambda: ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=24,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 16, 16],
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    given = {"scheduler": scheduler, "vae": None, "text_encoder": None, "tokenizer": None, "transformer": network}
    found = ZImagePipeline(**(given | parts))
    found.set_progress_bar_config(disable=True)
    return found


def embeddings(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Prompts of 35 tokens and, the first one, 5: the network fills them up to 64 and 32."""
    mask = torch.ones(count, 35, dtype=torch.bool)
    mask[0, 5:] = False
    return {"cap_feats": normal(count, 35, 24, seed=seed), "cap_feats_mask": mask}


def test_equals_the_pipeline(tmp_path):
    stock, rows, null = pipeline(), embeddings(2, 2), embeddings(1, 3)
    path = write_conditions(tmp_path / "conditions.safetensors", rows, null)
    teacher = load(write(tmp_path / "z", stock), size=[32, 64], conditions=path)
    assert teacher.shape == (4, 4, 8)
    states = rows["cap_feats"]
    for scale in (0.0, 5.0):  # the pipeline's scale is ours less 1
        expected = stock(
            height=32, width=64, num_inference_steps=4, output_type="latent", guidance_scale=scale, latents=NOISE,
            prompt_embeds=[states[0, :5], states[1]], negative_prompt_embeds=[null["cap_feats"][0, :5]] * 2,
        ).images  # fmt: skip
        same(ours(teacher, stock.scheduler.sigmas, NOISE, scale + 1), expected)
    finite_at_both_ends(teacher, NOISE)
    fits_students(teacher, NOISE)


def test_an_oracle_gives_back_its_velocity():
    class Stub(torch.nn.Module):
        config = {"in_channels": 4}

        def __call__(self, x, t, prompts, *, patch_size, f_patch_size, return_dict):
            assert [len(each) for each in prompts] == [5, 35]
            assert (patch_size, f_patch_size) == (2, 1)
            return (list(-exact(torch.stack(x), 1 - t)),)

    field = NetworkField(Stub(), linear(), "velocity", 1000.0, call=ARCHITECTURE.call)
    t = torch.tensor([0.1, 0.9])
    assert (field(NOISE, t, embeddings(2, 2)) - exact(NOISE, t)).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"siglip_feat_dim": 8}, "siglip_feat_dim=8: this network is also conditioned on images"),
        ({"all_patch_size": [2, 4], "all_f_patch_size": [1, 1]}, r"all_patch_size=\[2, 4\], all_f_patch_size=\[1, 1\]"),
    ],
)
def test_networks_that_are_called_in_another_way_are_refused(tmp_path, changes, said):
    (tmp_path / "config.json").write_text('{"_class_name": "ZImageTransformer2DModel"}')
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(InputError, match=said):
        load(tmp_path, prediction="velocity")


@pytest.mark.long
def test_encodes_prompts_as_the_pipeline(tmp_path):
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=12,
    )  # fmt: skip
    chat = "{% for message in messages %}user: {{ message['content'] }}{% endfor %}"
    stock = pipeline(text_encoder=seeded(lambda: Qwen3Model(config)), tokenizer=tokenizer(512, template=chat))
    teacher = prompted(tmp_path, stock, size=[32, 64])
    lengths = [len(f"user: {each}") + 1 for each in PROMPTS]
    assert teacher.conditioning.rows.take(torch.arange(2))["cap_feats"].shape == (2, max(lengths), 24)
    assert conditions(teacher, 2)["cap_feats_mask"].sum(1).tolist() == lengths
    expected = stock(
        prompt=list(PROMPTS), negative_prompt=[NEGATIVE] * 2, height=32, width=64, num_inference_steps=2,
        output_type="latent", guidance_scale=5.0, latents=NOISE,
    ).images  # fmt: skip
    same(ours(teacher, stock.scheduler.sigmas, NOISE, 6.0), expected)
