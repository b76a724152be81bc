"""Solves the paths of one block, from noise or from real data, and returns the tensors that a shard stores."""

import hashlib
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distill.data import DataSet, DataSource
from distill.flow import draws, solvers
from distill.flow.codecs import PIXELS
from distill.flow.draws import Rows
from distill.flow.fields import start
from distill.flow.interpolants import linear
from distill.flow.times import uniform_grid
from distill.pairs.manifest import Manifest
from distill.protocols import Codec, Cond, VelocityField
from distill.shards.values import restored, stored
from distill.spec.model import PairsStage
from distill.students import fitted
from distill.teachers.loaded import LoadedTeacher

CPU = torch.device("cpu")

# Indices of a block -> the real data [n, ...] of its paths and the condition, on the CPU.
Real = Callable[[range], tuple[Tensor, Cond]]


def of_data(
    data: DataSet | None,
    law: LoadedTeacher | None,
    *,
    seed: int,
    block: int,
    codec: Codec = PIXELS,
    device: torch.device = CPU,
) -> tuple[Real, str]:
    """The data that paths start from, and its digest.

    Path i starts from the i-th sample of `data`, in the order of its shuffled epochs, encoded by `codec` on `device`.
    Without `data` it starts from exact sample i of `law`, a teacher in closed form.
    """
    if data is None:
        assert law is not None and law.exact_data is not None, "checks.check lets no such stage through"
        return _exact(law.exact_data, law.num_classes, seed), law.digest
    source = DataSource(data, block, seed)

    def read(indices: range) -> tuple[Tensor, Cond]:
        batch = source.batch(indices.start // block, Rows(0, block, block))
        assert batch.data is not None
        return batch.data if codec.is_identity else codec.encode(batch.data.to(device)).cpu(), batch.cond

    if codec.is_identity:
        return read, data.digest
    return read, hashlib.sha256(f"{data.digest} {codec.digest}".encode()).hexdigest()


def _exact(exact: Callable[[int, Sequence[int]], Tensor], num_classes: int | None, seed: int) -> Real:
    def read(indices: range) -> tuple[Tensor, Cond]:
        cond = {} if num_classes is None else {"class_labels": draws.sample_labels(indices, num_classes)}
        return exact(seed, indices), cond

    return read


def solve(
    field: VelocityField, manifest: Manifest, indices: range, real: Real | None, device: torch.device
) -> dict[str, Tensor]:
    """Solve the paths `indices`, a whole block. Returns tensors on the CPU, float32 except the labels:

    data [n, ...]: the end of the path; or the real data of the path, rounded as in the file.
    noise [n, ...]: for forward paths only, the noise to which the data was inverted.
    states: for trajectories, those at times[1:-1], [n, len(times) - 2, ...]; for segments, their ends, [n, 1, ...].
    class_labels [n]: if the teacher has classes.
    """
    noise = draws.sample_noise(manifest.seed, indices, manifest.shape)
    found: dict[str, Tensor] = {}
    cond: Cond = {}
    if real is not None:
        data, cond = real(indices)
        found["data"] = restored(stored(data, manifest.dtype))  # the path starts from what readers will get
    elif manifest.num_classes is not None:
        cond = {"class_labels": draws.sample_labels(indices, manifest.num_classes)}
    if manifest.num_classes is None:
        cond = {}  # the teacher is unconditional
    on_device = {name: value.to(device) for name, value in cond.items()}
    field, given = solvers.on_linear_path(field), noise.to(device)
    bf16 = manifest.precision == "bf16"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        match manifest.paths:
            case "backward":
                if manifest.fitted is not None:
                    end = fitted.solve(field, given, on_device, manifest.fitted)
                else:
                    end = solvers.solve(field, given, on_device, solver=manifest.solver, steps=manifest.steps)
                found["data"] = end.cpu()
            case "forward":
                at = found["data"].to(device)
                noise = solvers.invert(field, at, on_device, solver=manifest.solver, steps=manifest.steps, noise=given)
                found["noise"] = noise.cpu()
            case "trajectories":
                states = _trajectory(field, start(field, given), on_device, manifest)
                found["data"] = states[-1].cpu()
                found["states"] = torch.stack([given, *states[:-1]], dim=1)[:, 1:].cpu()
            case "segments":
                found["states"] = _segments(field, found["data"].to(device), given, on_device, indices, manifest).cpu()
    return {**found, **cond}


def segment_starts(data: Tensor, noise: Tensor, indices: Sequence[int], times: list[float]) -> tuple[Tensor, Tensor]:
    """The starts x_t [n, ...] of segments, and their start and end times [n, 2].

    Path i goes from times[i mod K] to the next time, where K = len(times) - 1. x_t is a mix of data and noise.
    """
    number = torch.tensor(indices) % (len(times) - 1)
    of_path = torch.tensor(times, dtype=torch.float32)
    span = torch.stack([of_path[number], of_path[number + 1]], dim=1)  # [n, 2]
    return linear().mix(data, noise, span[:, 0].to(data.device)), span


def solver_grid(field: VelocityField, stage: PairsStage) -> list[float]:
    """The linear-path times along which a stage solves its paths; increasing for forward paths."""
    grid = solvers.inverting_grid if stage.paths == "forward" else solvers.grid_of
    return grid(field, stage.steps)


def actual_times(field: VelocityField, steps: int, times: list[float]) -> list[float]:
    """The times of the solver's grid for `times`, which are fractions of its range, multiples of 1 / steps."""
    t_min, t_max = solvers.on_linear_path(field).t_range
    grid = uniform_grid(steps, t_max, t_min).tolist()
    return [grid[steps - round(t * steps)] for t in times]


def _grid(field: VelocityField, manifest: Manifest) -> tuple[Tensor, list[int]]:
    """The solver's time grid, and the positions of the manifest's times in it."""
    t_min, t_max = field.t_range
    t_grid = uniform_grid(manifest.steps, t_max, t_min)
    assert manifest.times is not None
    return t_grid, [int((t_grid - t).abs().argmin()) for t in manifest.times]


def _trajectory(field: VelocityField, x: Tensor, cond: Cond, manifest: Manifest) -> list[Tensor]:
    """The states at times[1:]. All belong to one solution, because multistep solvers use the previous step."""
    t_grid, (_, *kept) = _grid(field, manifest)
    path = solvers.states(manifest.solver, field, x, t_grid, cond)
    return [state for i, state in enumerate(path, start=1) if i in kept]


def _segments(
    field: VelocityField, data: Tensor, noise: Tensor, cond: Cond, indices: range, manifest: Manifest
) -> Tensor:
    """The ends of the segments of a block, [n, 1, ...]. Paths with the same times are solved together."""
    assert manifest.times is not None
    starts, _ = segment_starts(data, noise, indices, manifest.times)
    ends, number = torch.empty_like(starts), torch.tensor(indices) % (len(manifest.times) - 1)
    t_grid, at = _grid(field, manifest)
    for segment, (i, j) in enumerate(pairwise(at)):
        rows = (number == segment).nonzero().squeeze(1).to(data.device)
        if len(rows):
            of_rows = {name: value[rows] for name, value in cond.items()}
            x = starts[rows] if segment else start(field, starts[rows])  # the first segment starts from pure noise
            ends[rows] = solvers.integrate(manifest.solver, field, x, t_grid[i : j + 1], of_rows)
    return ends[:, None]
