"""Less network per call, without training: early exit, and features that are reused, in a U-Net of diffusers.

A call costs the share of the network's floating-point operations that it makes, so the number of calls is a fraction.
Every sample takes the same path through the network; the time decides (ASE, Moon et al. 2024, arXiv 2408.05927, which
also trains the shortened network; A-SDM, Zhu et al. 2024, arXiv 2406.00210, reuses the features of earlier steps).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distill.flow.solvers import solve
from distill.protocols import Cond
from distill.teachers.network_field import NetworkField

from .multistep import times_of

Plan = Callable[[int, float], str]  # (index of the step, its time) -> a mode of `shortened`

PLANS: dict[str, Plan] = {
    "exit at mid, t > 0.5": lambda _, t: "no mid" if t > 0.5 else "full",
    "exit at mid, t < 0.5": lambda _, t: "no mid" if t < 0.5 else "full",
    "exit at coarse, t > 0.8": lambda _, t: "no coarse" if t > 0.8 else "full",
    "reuse, every 2nd": lambda i, _: "reuse" if i % 2 else "full",
    "reuse, every 2nd, t < 0.5": lambda i, t: "reuse" if i % 2 and t < 0.5 else "full",
}


class Cache:
    """The output of the coarse levels in the last full call."""

    features: Tensor


@dataclass
class ShortenedField:
    """A field whose network is shortened in some calls, by their index and time. Implements VelocityField."""

    field: NetworkField
    plan: Plan

    def __post_init__(self) -> None:
        self.interpolant, self.t_range = self.field.interpolant, self.field.t_range
        self.calls, self.cache = 0, Cache()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        mode = self.plan(self.calls, t[0].item())
        self.calls += 1
        with shortened(self.field.network, mode, self.cache):
            return self.field(x_t, t, cond)


@contextmanager
def shortened(network: UNet2DModel, mode: str, cache: Cache) -> Iterator[None]:
    """Within it, some blocks of a U-Net of two levels do less.

    "no mid": the blocks at the bottom pass their input on. "no coarse": so do all residual blocks of the coarse level,
    through the 1x1 convolution of blocks that change the number of channels. "reuse": the coarse level is not called;
    its output is that of the last "full" call.
    """
    down, mid, up = network.down_blocks[1], network.mid_block, network.up_blocks[0]
    instead: dict[nn.Module, Callable[..., object]] = {
        "full": {up: partial(_kept, cache, up.forward)},
        "no mid": {block: partial(_shortcut, block) for block in mid.resnets},
        "no coarse": {block: partial(_shortcut, block) for part in (down, mid, up) for block in part.resnets},
        "reuse": {down: _passed, mid: lambda x, *_, **__: x, up: lambda *_, **__: cache.features},
    }[mode]
    try:
        for block, forward in instead.items():
            block.forward = forward
        yield
    finally:
        for block in instead:
            del block.forward


def _kept(cache: Cache, forward: Callable[..., Tensor], *args: object, **options: object) -> Tensor:
    cache.features = forward(*args, **options)
    return cache.features


def _shortcut(block: nn.Module, x: Tensor, temb: Tensor) -> Tensor:
    return x if block.conv_shortcut is None else block.conv_shortcut(x)


def _passed(hidden_states: Tensor, temb: Tensor, **_: object) -> tuple[Tensor, tuple[Tensor]]:
    return hidden_states, (hidden_states,)


def shares(field: NetworkField, noise: Tensor, cond: Cond) -> dict[str, float]:
    """The floating-point operations of one call in each mode, relative to a full one."""
    found, cache = {}, Cache()
    for mode in ("full", "no mid", "no coarse", "reuse"):
        with shortened(field.network, mode, cache), FlopCounterMode(display=False) as counter, torch.no_grad():
            field(noise[:1], torch.ones(1), {name: value[:1] for name, value in cond.items()})
        found[mode] = float(counter.get_total_flops())
    return {mode: count / found["full"] for mode, count in found.items()}


def cost(plan: Plan, steps: int, share: dict[str, float]) -> float:
    """In full calls."""
    return sum(share[plan(i, t)] for i, t in enumerate(times_of(steps)[:-1]))


def sample(field: NetworkField, noise: Tensor, cond: Cond, plan: Plan, calls: int, share: dict[str, float]) -> Tensor:
    """Samples of ab3 in as many steps as cost at most `calls` full calls."""
    steps = max(n for n in range(1, 6 * calls) if cost(plan, n, share) <= calls + 1e-9)
    return solve(ShortenedField(field, plan), noise, cond, solver="ab3", steps=steps)
