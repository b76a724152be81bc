"""Velocity fields that wrap another field: change of schedule, indexed conditions, call counting.

A field takes t in float32 or float64, for any dtype of x_t, and returns a velocity in the dtype of x_t.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from distill.flow.interpolants import Interpolant, like
from distill.flow.waiting import any_known
from distill.protocols import Cond, Conditioning, VelocityField

ROUNDING = 1e-6  # a time may lie outside a range by this much, due to rounding in float32


@runtime_checkable
class Wrapping(Protocol):
    """A field that calls other fields, and knows how many network calls that takes."""

    def calls_at(self, t: Tensor) -> int: ...  # network calls per sample in one call of the field at the times t [B]


class Rescheduled:
    """The same ODE in the time and scale of another interpolant (Karras et al. 2022, arXiv 2206.00364, sec. 2).

    Points of two schedules with equal sigma/alpha have the same (data, noise). So x_t is rescaled to the field's own
    schedule, the field is called at its own time, its velocity is split into (data, noise), and the velocity of the new
    schedule is computed from these. Coefficients and split are computed in float64, because near the ends of a VP or
    EDM schedule they are large and cancel.

    `t_range` is the range of the field, converted at equal sigma/alpha. A time outside it raises ValueError: the
    teacher was not trained there, and using the nearest known time would solve another ODE.
    """

    def __init__(self, field: VelocityField, to: Interpolant) -> None:
        self.field, self.interpolant = field, to
        ends = to.time_of(field.interpolant.ratio(torch.tensor(field.t_range, dtype=torch.float64)))
        self.t_range: tuple[float, float] = (ends[0].item(), ends[1].item())

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        like(t, x_t)
        old, new = self.field.interpolant, self.interpolant
        t = inside(t.double(), self.t_range)
        old_t = inside(old.time_of(new.ratio(t)), self.field.t_range)
        at_old, at_new = old.path(old_t), new.path(t)
        # alpha_old/alpha_new = sigma_old/sigma_new. The ratio of the sums is equal to both, also where one is 0/0.
        scale = (at_old.alpha + at_old.sigma) / (at_new.alpha + at_new.sigma)
        x_old = (like(scale, x_t) * x_t).to(x_t.dtype)
        data, noise = old.split(x_old.double(), self.field(x_old, old_t, cond).double(), old_t)
        return new.velocity(data, noise, t).to(x_t.dtype)

    def calls_at(self, t: Tensor) -> int:
        old_t = self.field.interpolant.time_of(self.interpolant.ratio(t.double()))
        return calls_per_sample(self.field, old_t)


class Indexed:
    """A field that takes the index of each sample's condition in cond["class_labels"] [B], as pairs store it."""

    def __init__(self, field: VelocityField, conditioning: Conditioning) -> None:
        self.field, self.conditioning = field, conditioning
        self.interpolant, self.t_range = field.interpolant, field.t_range
        self._last: tuple[Tensor | None, Cond] = (None, {})  # a solver calls the field with the same indices many times

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if not cond:
            return self.field(x_t, t, cond)
        indices = cond["class_labels"]
        if self._last[0] is not indices:
            self._last = (indices, self.conditioning.collate(indices))
        return self.field(x_t, t, self._last[1])

    def calls_at(self, t: Tensor) -> int:
        return calls_per_sample(self.field, t)


class Counted:
    """Counts the cost of sampling: network `calls` per sample (two per guided call), and `rows` passed to the field."""

    def __init__(self, field: VelocityField) -> None:
        self.field, self.interpolant, self.t_range = field, field.interpolant, field.t_range
        self.calls = 0
        self.rows = 0

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.calls += self.calls_at(t)
        self.rows += x_t.shape[0]
        return self.field(x_t, t, cond)

    def calls_at(self, t: Tensor) -> int:
        return calls_per_sample(self.field, t)


def calls_per_sample(field: VelocityField, t: Tensor) -> int:
    """The number of network calls per sample in one call of the field at the times t [B]: 2 if it is guided, else 1."""
    return field.calls_at(t) if isinstance(field, Wrapping) else 1


def start(field: VelocityField, noise: Tensor) -> Tensor:
    """Returns x at the noisiest time of the field, sqrt(alpha^2 + sigma^2) noise.

    This has the variance of x_t at that time for data of unit variance.
    The factor is init_noise_sigma of diffusers: 1 for VP and linear paths, sqrt(sigma_max^2 + 1) for EDM.
    """
    c = field.interpolant.path(torch.tensor([field.t_range[1]], dtype=torch.float64))
    return (c.alpha.square() + c.sigma.square()).sqrt().item() * noise


def jump_to_data(flow_map: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Jumps from x_t [B, ...] at t [B] to the end of its path at time 0: f(x_t, t) = x_t - t u(x_t, t, 0)."""
    return x_t - like(t, x_t) * flow_map(x_t, t, torch.zeros_like(t), cond)


def drop_condition(cond: Cond, null: Cond, mask: Tensor) -> Cond:
    """Replaces the condition by the null condition in the rows where mask [B] bool is true."""
    if cond.keys() != null.keys():
        raise ValueError(f"cond has {sorted(cond)}, its null condition {sorted(null)}")
    if mask.dtype != torch.bool or any(mask.shape != value.shape[:1] for value in cond.values()):
        raise ValueError(f"a mask of rows must be bool [B], got {list(mask.shape)} in {mask.dtype}")
    return {name: torch.where(like(mask, value), null[name], value) for name, value in cond.items()}


def rows_to_call(mask: Tensor) -> Tensor:
    """Returns the indices [n >= 1] of the rows where mask [B] bool is true.

    If no row is selected, row 0 is used: networks cannot take an empty batch, and under ZeRO-3 every rank must make the
    call. The caller must then ignore the result.
    """
    found = mask.nonzero().squeeze(1)
    return found if len(found) else torch.zeros(1, dtype=torch.int64, device=mask.device)


def inside(t: Tensor, t_range: tuple[float, float]) -> Tensor:
    """Clamps t to t_range. Raises ValueError if a time is outside by more than rounding."""
    low, high = t_range
    if any_known(~((t >= low - ROUNDING) & (t <= high + ROUNDING))):
        raise ValueError(f"t must be within [{low:.6g}, {high:.6g}], got [{t.min():.6g}, {t.max():.6g}]")
    return t.clamp(low, high)
