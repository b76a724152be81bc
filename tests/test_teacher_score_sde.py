"""Score networks of a variance-exploding SDE as teachers: images in [0, 1], and sigma as the time."""

import pytest
import torch
from checkpoints import edit, load, refused
from diffusers import DDPMScheduler, ScoreSdeVePipeline, ScoreSdeVeScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from latent import as_module, autoencoder, finite_at_both_ends, normal, same, seeded, write

from distill.flow.fields import Rescheduled, start
from distill.flow.interpolants import edm, linear
from distill.flow.solvers import integrate
from distill.students.init import StudentInit
from distill.teachers.analytic import GaussianField
from distill.teachers.network_field import VeField

pytestmark = pytest.mark.costs("teacher ScoreSdeVePipeline")


def unet() -> UNet2DModel:
    return seeded(
        lambda: UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("SkipDownBlock2D", "SkipDownBlock2D"),
            up_block_types=("SkipUpBlock2D", "SkipUpBlock2D"),
            layers_per_block=1,
            time_embedding_type="fourier",
            norm_num_groups=4,
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("ve"), ScoreSdeVePipeline(unet(), ScoreSdeVeScheduler(sigma_max=20.0)))


@torch.no_grad()
def test_equals_the_probability_flow_of_the_network_in_its_own_units(folder):
    """The pipeline of diffusers is stochastic, so its loop is written here with the score and the sigmas that it uses:
    dx/dsigma = -sigma score.
    """
    network, scheduler, teacher = unet(), ScoreSdeVeScheduler(sigma_max=20.0), load(folder)
    scheduler.set_timesteps(6)
    scheduler.set_sigmas(6)
    sigmas = torch.cat([scheduler.sigmas, torch.zeros(1)])
    first = start(teacher.field, normal(3, 3, 8, 8))  # in [-1, 1], with 2 sigma
    x = (first + 1) / 2
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (after - sigma) * -sigma * network(x, sigma * torch.ones(3)).sample
    ratio = 2 * sigmas.double()
    field, grid = Rescheduled(teacher.field, linear()), ratio / (1 + ratio)
    same(integrate("euler", field, first * (1 - grid[0]).float(), grid, {}), 2 * x - 1)


def test_the_field_is_finite_at_both_ends(folder):
    teacher = load(folder)
    assert teacher.field.sigmas == pytest.approx((0.01, 20.0))
    finite_at_both_ends(teacher, normal(3, 3, 8, 8))


def test_an_oracle_gives_back_its_velocity():
    truth = GaussianField(torch.tensor([0.3]), torch.tensor([0.5]), edm())  # of data in [-1, 1]

    def network(x, sigma):
        t, x = 2 * sigma / (1 + 2 * sigma), 2 * x.reshape(3, 1) - 1
        noise = edm().convert(x, truth(x, t, {}), t, "velocity", "epsilon")
        return UNet2DOutput(sample=(-noise / sigma[:, None]).reshape(3, 1, 1, 1))

    x, t = normal(3, 1).double(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    got = VeField(as_module(network), (0.02, 0.98))(x[:, :, None, None], t, {})
    assert (got.reshape(3, 1) - truth(x, t, {})).abs().max() <= 1e-6


def test_a_student_starts_as_the_teacher(folder):
    teacher, x = load(folder), normal(3, 3, 8, 8)
    reference = Rescheduled(teacher.field, linear())
    t = torch.tensor([*reference.t_range, 0.5], dtype=torch.float64)
    student = StudentInit(teacher, None, teacher.shape, None, 0, teacher).velocity_field().eval()
    with torch.no_grad():
        expected = reference(x, t, {})
        assert (student(x, t, {}) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert student(x, torch.tensor([0.0, 1.0, 1.0]), {}).isfinite().all()


def test_what_does_not_fit_is_refused(folder, tmp_path):
    refused(folder, "teacher.prediction=epsilon is not supported for the ve path, on which", prediction="epsilon")
    DDPMScheduler().save_pretrained(tmp_path / "vp")
    refused(folder, "describes the vp path, but", "the ve path; remove", scheduler=str(tmp_path / "vp"))
    autoencoder().save_pretrained(tmp_path / "vae")
    edit(tmp_path / "vae" / "config.json", latent_channels=3)
    said = "schedulers of the ve path are for images in [0, 1], but the UNet2DModel of "
    refused(folder, said, "works on latents", vae=str(tmp_path / "vae"))
