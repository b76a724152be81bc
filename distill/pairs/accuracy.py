"""Checks whether the solver of the pairs is accurate enough. If not, students learn another map than the teacher's."""

from pathlib import Path

import torch
from torch import Tensor

from distill.core.atomic import write_json
from distill.core.field_types import FrozenModel
from distill.core.stop import StopRequest
from distill.pairs import paths
from distill.pairs.manifest import Manifest
from distill.pairs.paths import Real
from distill.protocols import VelocityField
from distill.runs.progress import Progress
from distill.spec.samplingspec import TOLERANCE

BIG = 50_000  # sets of at least so many pairs are checked before they are made, without being asked for
SAMPLE = 1000  # pairs that are solved with N and with 2 N steps
DOUBLINGS = 6


class Accuracy(FrozenModel):
    """The difference between the ends of the first pairs with N solver steps and those with 2 N."""

    steps: int
    pairs: int
    differences: dict[int, float]
    """by N: relative RMS difference between N and 2 N steps"""

    @property
    def enough(self) -> int | None:
        """The smallest tried number of steps whose difference is at most `TOLERANCE`; None if there is none."""
        return next((steps for steps, found in sorted(self.differences.items()) if found <= TOLERANCE), None)

    def describe(self) -> str:
        """The result in one sentence."""
        given = self.differences[self.steps]
        ends = f"with {self.steps} steps, the endpoints of {self.pairs:,} pairs"
        said = f"{ends} differ by {given:.2%} (RMS) from those with {2 * self.steps} steps"
        if self.enough == self.steps:
            return f"{said}; {self.steps} steps are enough"
        if self.enough is not None:
            found = self.differences[self.enough]
            return f"{said}, more than the tolerated {TOLERANCE:.0%}; {self.enough} steps are enough ({found:.2%})"
        last = max(self.differences)
        if last == self.steps:
            return f"{said}, more than the tolerated {TOLERANCE:.0%}"
        return f"{said}; even {last} steps are not enough ({self.differences[last]:.2%})"


def measure(
    field: VelocityField,
    manifest: Manifest,
    real: Real | None,
    device: torch.device,
    stop: StopRequest,
    doublings: int = DOUBLINGS,
) -> Accuracy:
    """Compare N and 2 N steps, then 2 N and 4 N, ..., until they agree or after `doublings` comparisons.

    N is the manifest's number of steps. Nothing is written.
    """
    count, steps, found = min(SAMPLE, manifest.count), manifest.steps, dict[int, float]()
    coarse = ends(field, manifest, real, device, count, stop)
    for _ in range(doublings):
        fine = ends(field, manifest.model_copy(update={"steps": 2 * steps}), real, device, count, stop)
        found[steps] = difference(coarse, fine)
        if found[steps] <= TOLERANCE:
            break
        coarse, steps = fine, 2 * steps
    return Accuracy(steps=manifest.steps, pairs=count, differences=found)


def advise(
    field: VelocityField,
    manifest: Manifest,
    real: Real | None,
    device: torch.device,
    folder: Path,
    progress: Progress,
    stop: StopRequest,
) -> None:
    """Before a set of at least `BIG` pairs is made: measure once, write `accuracy.json`, and warn of too few steps."""
    path = folder / "accuracy.json"
    if manifest.count < BIG or path.exists():
        return
    found = measure(field, manifest, real, device, stop, doublings=1)
    write_json(path, found.model_dump(mode="json"))
    if found.enough is None:
        progress.warn(f"{found.describe()}; to find how many steps are enough, use `distill pairs` with --check")


def difference(values: Tensor, exact: Tensor) -> float:
    """The root mean square of values - exact, relative to that of `exact`; both [n, ...]."""
    rms = exact.double().square().mean().sqrt()
    return ((values.double() - exact.double()).square().mean().sqrt() / rms).item()


def ends(
    field: VelocityField, manifest: Manifest, real: Real | None, device: torch.device, count: int, stop: StopRequest
) -> Tensor:
    """The ends that the solver computes for the first `count` paths, [count, ...]."""
    key, blocks = {"forward": "noise", "segments": "states"}.get(manifest.paths, "data"), list[Tensor]()
    for start in range(0, count, manifest.block):
        stop.raise_if_requested("nothing, since the accuracy of the solver was being measured")
        blocks.append(paths.solve(field, manifest, range(start, start + manifest.block), real, device)[key])
    return torch.cat(blocks)[:count]
