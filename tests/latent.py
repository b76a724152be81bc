"""Tiny random pipelines of latent-space models: writing them, and sampling them by our solvers.

The test of each convention compares with the stock pipeline, from the same latents, embeddings and times.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from distill import teachers
from distill.flow.fields import Rescheduled, start
from distill.flow.interpolants import linear, vp
from distill.flow.solvers import integrate
from distill.spec.model import CheckpointTeacher
from distill.teachers.analytic import GaussianField

CPU = torch.device("cpu")


def seeded(make, seed: int = 0):
    """What `make` builds, from this seed and in evaluation mode. Weights that start as zero are drawn, too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make()
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return network.eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, pipeline) -> Path:
    """The folder of a pipeline as diffusers writes it."""
    pipeline.save_pretrained(folder)
    return folder


def write_conditions(path: Path, rows: dict[str, Tensor], null: dict[str, Tensor] | None = None) -> str:
    """A file with conditions, as `teacher.conditions` names it."""
    save_file({**rows, **{f"null.{name}": each for name, each in (null or {}).items()}}, path)
    return str(path)


def load(folder: Path, **fields) -> teachers.LoadedTeacher:
    return teachers.load_teacher(CheckpointTeacher(path=str(folder), **fields), CPU)


def conditions(teacher: teachers.LoadedTeacher, count: int):
    """The conditions of samples 0 to count - 1, which use the rows of the file in turn."""
    if teacher.conditioning.count is None:
        return {}
    return teacher.conditioning.collate(torch.arange(count) % teacher.conditioning.count)


@torch.no_grad()
def ours(teacher: teachers.LoadedTeacher, t_grid: Tensor, noise: Tensor, guidance_scale: float = 1.0) -> Tensor:
    """Euler on the linear path over t_grid (the sigmas of a flow scheduler), from noise [B, C, ...]."""
    field = teacher.guided(guidance_scale)
    sigma = t_grid[:1].double() / (1 - t_grid[:1].double())
    c = field.interpolant.path(field.interpolant.time_of(sigma))
    scale = 1.0 if sigma.isinf() else (c.alpha + c.sigma).item()
    x = start(field, noise) / scale
    return integrate("euler", Rescheduled(field, linear()), x, t_grid.double(), conditions(teacher, len(noise)))


def same(got: Tensor, expected: Tensor, within: float = 1e-4) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= within, (got - expected).abs().max()
    assert 0.05 < expected.std() < 50  # samples, not zeros


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def exact(x: Tensor, t: Tensor) -> Tensor:
    """The velocity of data from N(0.3, 0.5^2) on the linear path at x [B, ...] and t [B]: what an oracle returns."""
    return GaussianField(torch.tensor([0.3]), torch.tensor([0.5]))(
        x.reshape(-1, 1), t.repeat_interleave(x[0].numel()), {}
    ).reshape(x.shape)


def exact_epsilon(x: Tensor, n: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The noise prediction for the same data at x [B, ...] of a VP table, with its steps n [B]."""
    path = vp(alphas_cumprod)
    t = n.double() / (len(alphas_cumprod) - 1)
    field = GaussianField(torch.tensor([0.3]), torch.tensor([0.5]), path)
    v = field(x.double().reshape(-1, 1), t.repeat_interleave(x[0].numel()), {}).reshape(x.shape)
    return path.convert(x.double(), v, t, "velocity", "epsilon").to(x.dtype)


@torch.no_grad()
def finite_at_both_ends(teacher: teachers.LoadedTeacher, noise: Tensor) -> None:
    for t in teacher.field.t_range:
        found = teacher.field(noise, torch.full((len(noise),), t), conditions(teacher, len(noise)))
        assert found.shape == noise.shape
        assert found.isfinite().all()
