"""Small teachers in folders in diffusers' format, and the standard sampling loops that the tests compare with."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import nn

from distill import teachers
from distill.core.errors import InputError
from distill.flow.fields import Rescheduled, start
from distill.flow.interpolants import linear
from distill.flow.solvers import integrate
from distill.spec.model import CheckpointTeacher

CPU = torch.device("cpu")
STEPS = 5


def unet(classes: int | None = None, seed: int = 0) -> UNet2DModel:
    """About 20,000 weights, random, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            num_class_embeds=classes,
        ).eval()


def write(folder: Path, network: nn.Module, scheduler) -> Path:
    """A pipeline folder as diffusers writes it."""
    DDIMPipeline(network, DDIMScheduler()).save_pretrained(folder)  # the folder's index; it would convert the scheduler
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"][1] = type(scheduler).__name__
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def load(folder: Path, **fields) -> teachers.LoadedTeacher:
    return teachers.load_teacher(CheckpointTeacher(path=str(folder), **fields), CPU)


def noise(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def stock(network: nn.Module, scheduler, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """The plain loop over network and scheduler: no stock pipeline passes labels."""
    for timestep in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, timestep) if "scale_model_input" in dir(scheduler) else x
        x = scheduler.step(network(inputs, timestep, class_labels=labels).sample, timestep, x).prev_sample
    return x


@torch.no_grad()
def ours(teacher: teachers.LoadedTeacher, t_grid: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Euler on the linear path over t_grid, from the noise on the native scale at its first point."""
    field = teacher.field
    sigma = t_grid[:1] / (1 - t_grid[:1])
    c = field.interpolant.path(field.interpolant.time_of(sigma))
    x = start(field, noise()) / (c.alpha + c.sigma).item()
    return integrate(
        "euler", Rescheduled(field, linear()), x, t_grid, {} if labels is None else {"class_labels": labels}
    )


def vp_grid(scheduler: DDIMScheduler) -> torch.Tensor:
    """Linear time of the scheduler's steps, then 0 (set_alpha_to_one)."""
    alphas = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    alpha, sigma = alphas.sqrt(), (1 - alphas).sqrt()
    return torch.cat([sigma / (alpha + sigma), torch.zeros(1)])


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-4
    assert 0.1 < expected.abs().max() < 50  # the images are images, not zeros


def refused(path: Path | str, *parts: str, **fields) -> None:
    with pytest.raises(InputError) as error:
        load(path, **fields)
    for part in parts:
        assert part in str(error.value), str(error.value)


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
