"""Unconditional latent diffusion as a teacher."""

import shutil

import pytest
import torch
from checkpoints import edit, refused
from diffusers import LDMPipeline, UNet2DModel, VQModel
from latent import ddim, finite_at_both_ends, load, normal, ours, same, seeded, vp_grid, write
from students import card

from distill.flow.solvers import on_linear_path
from distill.spec.model import CheckpointTeacher
from distill.students.exporting import export
from distill.students.init import StudentInit
from distill.students.loaded import load_student

pytestmark = pytest.mark.costs("teacher LDMPipeline")


def pipeline(channels: int = 4) -> LDMPipeline:
    network = seeded(
        lambda: UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
        )
    )
    vqvae = seeded(
        lambda: VQModel(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=5,
            vq_embed_dim=channels,
            num_vq_embeddings=16,
            norm_num_groups=2,
            scaling_factor=0.3,
        )
    )
    found = LDMPipeline(vqvae, network, ddim(beta_end=0.01))
    found.set_progress_bar_config(disable=True)
    return found


@pytest.mark.parametrize("channels", [3, 4])
def test_equals_the_pipeline(tmp_path, channels):
    """The pipeline takes a generator instead of latents, and returns decoded ones; they are caught before that."""
    stock, latents = pipeline(channels), []
    teacher, noise = load(write(tmp_path / "ldm", stock)), normal(3, channels, 8, 8, seed=5)
    assert teacher.shape == (channels, 8, 8)
    assert teacher.codec.shape((3, 16, 16)) == teacher.shape
    finite_at_both_ends(teacher, noise)
    stock.vqvae.quantize.register_forward_pre_hook(lambda module, inputs: latents.append(inputs[0]))
    generator = torch.Generator().manual_seed(5)
    pixels = torch.from_numpy(stock(3, generator, num_inference_steps=4, output_type="np").images).permute(0, 3, 1, 2)
    got = ours(teacher, vp_grid(stock.scheduler), noise)
    same(got, 0.3 * latents[0])
    same((teacher.codec.decode(got) / 2 + 0.5).clamp(0, 1), pixels)
    with torch.no_grad():
        same(teacher.codec.encode(pixels), 0.3 * stock.vqvae.encode(pixels).latents)


def test_a_student_works_on_the_latents_of_its_teacher(tmp_path):
    folder = write(tmp_path / "ldm", pipeline())
    teacher, x, t = load(folder), normal(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    student = StudentInit(teacher, None, teacher.shape, None, 0, teacher).velocity_field().eval()
    export(student, tmp_path / "student", card(shape=teacher.shape))
    alone = load_student(tmp_path / "student", torch.device("cpu"))
    latent = load_student(tmp_path / "student", torch.device("cpu"), like=CheckpointTeacher(path=str(folder)))
    assert alone.codec.is_identity
    assert latent.codec.shape((3, 16, 16)) == latent.shape == alone.shape == teacher.shape
    with torch.no_grad():
        same(latent.student(x, t, {}), on_linear_path(teacher.field)(x, t, {}))


def test_a_network_on_latents_needs_its_autoencoder(tmp_path):
    folder = write(tmp_path / "ldm", pipeline())
    alone = shutil.copytree(folder / "unet", tmp_path / "alone")
    scheduler = str(folder / "scheduler")
    assert load(folder / "unet").digest == load(folder).digest
    assert not load(folder / "unet").codec.is_identity
    refused(alone, "in_channels=4, as in a latent space", "or set teacher.vae to the folder of", scheduler=scheduler)
    teacher = load(alone, scheduler=scheduler, vae=str(folder / "vqvae"))
    assert teacher.codec.shape((3, 16, 16)) == teacher.shape
    refused(folder, "teacher.size=[16, 16] has no effect", size=[16, 16])
    edit(folder / "vqvae" / "config.json", vq_embed_dim=5)
    refused(
        folder,
        "on latents of 4 channels, but the autoencoder in ",
        "makes latents of 5 channels; give the autoencoder that",
    )
