"""Decoding of latents: once for each sample, a few at a time, and in tiles if they are large."""

import io
from pathlib import Path

import numpy as np
import pytest
import test_teacher_dit as dit
import test_teacher_ltx as ltx
import torch
from diffusers import AutoencoderDC, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.models.autoencoders.vae import Decoder
from latent import CPU, autoencoder, load, normal, seeded, write
from PIL import Image
from students import card
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from distill.core.stop import StopRequest
from distill.data.arrays import ArrayData
from distill.evaluation import measuring
from distill.evaluation.metrics import features
from distill.evaluation.pictures import images_png
from distill.evaluation.sample import write_samples
from distill.runs.progress import Progress
from distill.spec.model import CheckpointTeacher, EvaluateStage
from distill.students.exporting import export
from distill.students.init import StudentInit
from distill.teachers import codecs, tiling
from distill.teachers.codecs import LatentCodec

PIXELS = normal(9, 3, 16, 16, seed=4).tanh()
WAN = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
NUMBERS = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
DC = {"block_out_channels": (4, 4, 4, 4, 4, 8), "block_types": "ResBlock", "layers_per_block": (1,) * 6}


def flux2() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=2,
        norm_num_groups=4,
        decoder_block_out_channels=(8, 8, 8),
    )


def dc() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        decoder_norm_types="rms_norm",
        **{f"{part}_{name}": value for name, value in DC.items() for part in ("encoder", "decoder")},
    )


# An autoencoder, the shape of latents, the pixels of a tile, and the RMS difference of tiled and whole decoding,
# relative to the standard deviation of pixels. It is large, since weights are random and tiles are small.
TILED = {
    "AutoencoderKL": (lambda: autoencoder(3), (4, 32, 40), 64, 0.2),
    "AutoencoderKLWan": (lambda: seeded(lambda: AutoencoderKLWan(**WAN, **NUMBERS)), (4, 2, 16, 20), 64, 0.3),
    "AutoencoderKLQwenImage": (lambda: seeded(lambda: AutoencoderKLQwenImage(**WAN, **NUMBERS)), (4, 16, 20), 64, 0.06),
    "AutoencoderKLFlux2": (lambda: seeded(flux2), (8, 16, 20), 64, 0.45),
    "AutoencoderKLLTXVideo": (ltx.autoencoder, (4, 3, 16, 20), 64, 0.4),
    "AutoencoderDC": (lambda: seeded(dc), (4, 8, 10), 128, 0.7),
}
SLOW = ("AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLFlux2", "AutoencoderKLLTXVideo", "AutoencoderDC")


def decoder_calls(codec: LatentCodec, latents) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    shapes = []
    hook = codec._read.decoder.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    try:
        return codec.decode(latents), shapes
    finally:
        hook.remove()


@pytest.mark.parametrize("name", [pytest.param(k, marks=pytest.mark.long) if k in SLOW else k for k in TILED])
def test_large_samples_are_decoded_in_tiles(tmp_path, monkeypatch, name):
    make, shape, tile, allowed = TILED[name]
    make().save_pretrained(tmp_path)
    codec, latents = LatentCodec.of(tmp_path), normal(2, *shape)
    monkeypatch.setattr(tiling, "TILE", tile)
    monkeypatch.setattr(tiling, "LONG_TILE", tile)
    whole, shapes = decoder_calls(codec, latents)
    frames = 2 if name == "AutoencoderKLWan" else 1  # Wan decodes one frame of latents at a time
    assert len(shapes) == frames and shapes[0][0] == 2
    monkeypatch.setattr(codecs, "WHOLE", codec._decoding(shape) - 1)
    tiled, shapes = decoder_calls(codec, latents)
    side = tile // codec.factors[1] * (2 if codec.kind.patches else 1)
    assert len(shapes) == frames * 3 * 4, "128 by 160 pixels, or twice as many, in strides of three quarters of a tile"
    assert max(max(each[-2:]) for each in shapes) == side
    error = (tiled - whole).square().mean().sqrt() / whole.std()
    assert tiled.shape == whole.shape and 1e-4 < error <= allowed
    assert not codec._read.use_tiling, "images are never encoded in tiles"


def test_within_tiles_nothing_changes_if_a_pixel_sees_only_its_neighbours(tmp_path, monkeypatch):
    """Without attention and the statistics of group norms, tiles differ at their borders only."""
    autoencoder(3, mid_block_add_attention=False).save_pretrained(tmp_path)
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda self, x: x)
    monkeypatch.setattr(tiling, "TILE", 128)
    codec, latents = LatentCodec.of(tmp_path), normal(1, 4, 56, 24)  # tiles begin at the rows 0, 96 and 192 of 224
    whole = codec.decode(latents)
    monkeypatch.setattr(codecs, "WHOLE", 0)
    error = (codec.decode(latents) - whole).abs().amax((0, 1, 3))
    exact = error <= 1e-5 * whole.std()
    assert exact[:40].all() and exact[176:190].all() and not exact[96:128].all() and not exact[200:].all()


def test_samples_are_decoded_together_while_memory_lasts(tmp_path, monkeypatch):
    autoencoder().save_pretrained(tmp_path)
    codec, latents = LatentCodec.of(tmp_path), normal(5, 4, 8, 8)
    assert codec._decoding((4, 8, 8)) == 3100 * 16 * 16
    monkeypatch.setattr(codecs, "TOGETHER", 2 * 3100 * 16 * 16)
    found, shapes = decoder_calls(codec, latents)
    assert [each[0] for each in shapes] == [2, 2, 1]
    monkeypatch.setattr(codecs, "TOGETHER", 1)
    assert (decoder_calls(codec, latents)[0] - found).abs().max() <= 1e-6


def test_gradients_flow_through_the_decoder(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    codec, latents = LatentCodec.of(tmp_path), normal(3, 4, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(codec.decode(latents).square().sum(), latents)
    step = 0.1 * gradient / gradient.norm()
    ahead, behind = (codec.decode(latents.detach() + sign * step).square().sum() for sign in (1, -1))
    assert ((ahead - behind) / (0.2 * gradient.norm())).item() == pytest.approx(1, abs=0.05)
    assert codec._read.decoder.gradient_checkpointing, "activations are computed again, not kept"
    assert all(each.grad is None for each in codec._read.parameters())
    assert not codec.decode(latents.detach()).requires_grad


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("decoding") / "dit", dit.pipeline(num_embeds_ada_norm=3))


@pytest.fixture
def decoded():
    """How many samples each call of a decoder has decoded."""
    counts: list[int] = []
    hook = register_module_forward_pre_hook(
        lambda module, inputs: counts.append(len(inputs[0])) if isinstance(module, Decoder) else None
    )
    yield counts
    hook.remove()


@pytest.mark.parametrize("compared", [pytest.param(True, marks=pytest.mark.long), False])
def test_an_evaluation_decodes_each_sample_once(folder, tmp_path, monkeypatch, decoded, compared):
    """For features and pictures together. Without real data, only what is shown: six rows of the three classes."""
    monkeypatch.setattr(features, "TRAIN_IMAGES", 512)
    rows = {"students": {}, "teacher_steps": [1, 2], "fine_steps": 1, "baselines": []}
    stage = EvaluateStage(kind="evaluate", samples=20, block=7, **rows)
    data = ArrayData("images", PIXELS, torch.arange(9) % 3, 3) if compared else None
    with Progress("measure", 60, "samples", None) as progress:
        found = measuring.measure(
            tmp_path, "x", stage, load(folder), {}, data,
            seed=0, device=CPU, progress=progress, stop=StopRequest(), store=tmp_path,
        )  # fmt: skip
    assert len(found.rows) == 3 and sum(decoded) == 3 * (20 if compared else 18)
    assert (found.latents, found.captions) == (True, [])
    assert (found.rows[0].distance is not None) == compared


def test_a_picture_decodes_each_sample_once(folder, tmp_path, decoded):
    teacher = load(folder)
    student = StudentInit(teacher, None, teacher.shape, 3, 0, teacher).velocity_field().eval()
    export(student, tmp_path / "student", card(shape=teacher.shape, num_classes=3), teacher.packaging)
    for name, steps, expected in (("x.png", 3, 5), ("x.safetensors", 3, 0)):
        decoded.clear()
        write_samples(
            tmp_path / "student", tmp_path / name, steps=steps, seed=0, count=5, labels=None, device=CPU,
            like=CheckpointTeacher(path=str(folder)),
        )  # fmt: skip
        assert sum(decoded) == expected


def test_pictures_of_large_images_are_made_smaller():
    images = torch.linspace(-1, 1, 16).repeat_interleave(8).expand(5, 3, 96, 128)  # steps of 8 columns
    small = np.asarray(Image.open(io.BytesIO(images_png(images, 3, 2 * 96 * 128))))
    assert small.shape == (2 * 48 + 1, 3 * 64 + 2, 3), "by half, with a line between them"
    expected = ((torch.linspace(0, 1, 16) * 255).round().to(torch.uint8)).repeat_interleave(4).numpy()
    assert (small[0, :64, 0] == expected).all()
    assert np.asarray(Image.open(io.BytesIO(images_png(images, 3)))).shape == (193, 386, 3)
