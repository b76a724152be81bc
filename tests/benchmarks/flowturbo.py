"""FlowTurbo (Zhao et al. 2024, arXiv 2409.18128): a small network that predicts changes of the velocity, on digits.

A refiner R(x, t | V) + V predicts the velocity v(x, t) from a velocity V that was seen earlier on the path. It is
trained, with a frozen teacher, on V = v(x_u, u) of noised data x_u and the Euler step from there to x at t = u - d. The
sampler makes Heun steps, then pseudo-corrector steps (Heun steps from the velocity at the end of the last step), then
refiner steps (Heun steps with R instead of the teacher), all of the same length.

Deviations from the paper: d is uniform up to 0.25 instead of 0.12, as there are fewer steps, and drawn for each sample
instead of each batch; no labels are dropped, as there is no guidance; U-Nets instead of transformers, with the last
layer zero at first.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distill.data import DataSource, load_data
from distill.flow.draws import Rows, generator
from distill.flow.interpolants import like, linear
from distill.flow.solvers import solve
from distill.protocols import Cond, VelocityField
from distill.spec.model import DigitsData

from .solvers import digits, trained

CALLS = (4, 6, 8)
STEPS, BATCH, LR, AVERAGE, LONGEST = 2000, 64, 2e-3, 0.998, 0.25
CHANNELS = ((8,), (16,), (32, 48))  # of the refiners; the last are the teacher's
MOST = 12  # refiner steps

Velocity = Callable[[Tensor, float], Tensor]  # (x, t) -> v
Refiner = Callable[[Tensor, float, Tensor], Tensor]  # (x, t, V) -> v


def sample(velocity: Velocity, refiner: Refiner, x: Tensor, times: Sequence[float], heun: int, pseudo: int) -> Tensor:
    """x at the last of the decreasing times: `heun` Heun steps, `pseudo` pseudo-corrector steps, and refiner steps."""
    seen = x
    for i, (t, t_next) in enumerate(pairwise(times)):
        refined = i >= heun + pseudo
        start = velocity(x, t) if i < heun else refiner(x, t, seen) if refined else seen
        predicted = x + (t_next - t) * start
        seen = refiner(predicted, t_next, start) if refined else velocity(predicted, t_next)
        x = x + (t_next - t) * (start + seen) / 2
    return x


def splits(calls: float, fraction: float) -> Iterator[tuple[int, int, int]]:
    """(Heun, pseudo-corrector, refiner) steps that cost at most `calls`; a call of the refiner costs `fraction`."""
    for heun in (1, 2):
        for pseudo in range(int(calls) - 2 * heun + 1):
            left = calls - 2 * heun - pseudo
            most = MOST if fraction == 0 else min(MOST, math.floor(left / (2 * fraction)))
            yield from ((heun, pseudo, n) for n in sorted({0, 1, 2, 3, 4, 6, 8, most}) if n <= most)


def network(channels: tuple[int, ...], inputs: int) -> UNet2DModel:
    """A U-Net like the teacher's, for 8 x 8 images of ten classes and the null class."""
    made = UNet2DModel(
        sample_size=8, in_channels=inputs, out_channels=1, block_out_channels=channels, layers_per_block=1,
        down_block_types=("DownBlock2D",) * len(channels), up_block_types=("UpBlock2D",) * len(channels),
        norm_num_groups=8, add_attention=False, num_class_embeds=11,
    )  # fmt: skip
    if inputs == 2:
        torch.nn.init.zeros_(made.conv_out.weight)
        torch.nn.init.zeros_(made.conv_out.bias)
    return made


def refine(net: UNet2DModel, x: Tensor, t: Tensor, seen: Tensor, cond: Cond) -> Tensor:
    """R(x, t | seen) + seen, for x [B, 1, 8, 8] at t [B]."""
    return seen + net(torch.cat([x, seen], dim=1), 1000 * t, cond["class_labels"]).sample


def train(field: VelocityField, nets: Sequence[UNet2DModel]) -> list[UNet2DModel]:
    """Trains refiners on the same batches; returns the moving averages of their weights."""
    source, random = DataSource(load_data(DigitsData(kind="digits"), 0), BATCH, 0), generator("flowturbo")
    optimizers = [torch.optim.AdamW(net.parameters(), lr=LR) for net in nets]
    averages = [torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=_average) for net in nets]
    change, losses = 0.0, [0.0 for _ in nets]
    for step in range(STEPS):
        batch = source.batch(step, Rows(0, BATCH, BATCH))
        assert batch.data is not None
        noise = torch.randn(batch.data.shape, generator=random)
        u, length = torch.rand(BATCH, generator=random), LONGEST * torch.rand(BATCH, generator=random)
        with torch.no_grad():
            x = linear().mix(batch.data, noise, u)
            seen = field(x, u, batch.cond)
            t = (u - length).clamp(min=0)
            x = x + like(t - u, x) * seen
            target = field(x, t, batch.cond)
        change += (target - seen).square().mean().item()
        for i, (net, optimizer, average) in enumerate(zip(nets, optimizers, averages, strict=True)):
            optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / 100) * (1 - step / STEPS)
            loss = (refine(net, x, t, seen, batch.cond) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(net)
            losses[i] += loss.item()
        if (step + 1) % 250 == 0:
            said = ", ".join(f"{loss / change:.3f}" for loss in losses)
            print(f"{step + 1} steps, {time.process_time():.0f} CPU s, loss relative to R = 0: {said}", flush=True)
            change, losses = 0.0, [0.0 for _ in nets]
    return [average.module.eval() for average in averages]


def _average(averaged: Sequence[Tensor], current: Sequence[Tensor], _: Tensor | int) -> None:
    torch._foreach_lerp_(averaged, current, 1 - AVERAGE)


def cost(channels: tuple[int, ...], inputs: int) -> tuple[float, float]:
    """Operations, and the least seconds, of a call for 96 samples."""
    net, x, t, labels = (
        network(channels, inputs).eval(),
        torch.randn(96, inputs, 8, 8),
        torch.rand(96),
        torch.arange(96),
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x, t, labels % 10)
    durations = []
    with torch.no_grad():
        for _ in range(20):
            began = time.perf_counter()
            net(x, t, labels % 10)
            durations.append(time.perf_counter() - began)
    return counter.get_total_flops(), min(durations)


def bench(teacher: Path) -> list[str]:
    """RMS errors by number of calls, on the noises of `solvers`. For each, the best split: this favours FlowTurbo."""
    torch.manual_seed(0)
    field, noise, cond, truth = digits(teacher)
    nets = train(field, [network(channels, 2) for channels in CHANNELS])
    whole = cost(CHANNELS[-1], 1)

    def error(samples: Tensor) -> float:
        return (samples - truth).double().square().mean().sqrt().item()

    def velocity(x: Tensor, t: float) -> Tensor:
        return field(x, torch.full((len(x),), t), cond)

    def tried(refiner: Refiner, heun: int, pseudo: int, refined: int) -> float:
        steps = heun + pseudo + refined
        times = [1 - i / steps for i in range(steps + 1)]
        return error(sample(velocity, refiner, noise, times, heun, pseudo))

    def row(net: UNet2DModel, fraction: float) -> str:
        def refiner(x: Tensor, t: float, seen: Tensor) -> Tensor:
            return refine(net, x, torch.full((len(x),), t), seen, cond)

        cells = []
        for calls in CALLS:
            found = {split: tried(refiner, *split) for split in splits(calls, fraction)}
            best = min(found, key=lambda split: found[split])
            cells.append(f"{found[best]:.4f} {best!s:12s}")
        return "  ".join(cells)

    with torch.no_grad():
        along = [error(solve(field, noise, cond, solver="ab2", steps=calls)) for calls in CALLS]
        lines = [f"{'ab2':48s}" + "  ".join(f"{each:.4f}{'':13s}" for each in along)]
        exact = [tried(lambda x, t, seen: velocity(x, t), 1, calls - 2, 1) for calls in CALLS]
        lines.append(f"{'exact refiner in the last step':48s}" + "  ".join(f"{each:.4f}{'':13s}" for each in exact))
        for channels, net in zip(CHANNELS, nets, strict=True):
            operations, seconds = (ours / theirs for ours, theirs in zip(cost(channels, 2), whole, strict=True))
            lines.append(
                f"refiner {channels!s:9s} {operations:.3f} calls (by time {seconds:.2f})    {row(net, operations)}"
            )
            lines.append(f"refiner {channels!s:9s} if its calls cost nothing       {row(net, 0)}")
    return lines


def bench_flowturbo() -> str:
    """Trains the digits teacher, then refiners of three sizes."""
    with tempfile.TemporaryDirectory() as folder:
        lines = bench(trained(Path(folder)))
    title = f"flowturbo, RMS error and (Heun, pseudo-corrector, refiner) steps, for {CALLS} calls:"
    return "\n    ".join([title, *lines])
