"""Guidance, and scaling of the predicted noise: velocity fields made from those of one or two networks.

Classifier-free guidance at all times is the same on every path. All else is defined on the linear path, to which the
field is converted first: v is the velocity of x_t = (1 - t) data + t noise, and x_t - t v the data prediction. Sums
over a sample are computed in float32 or better.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from distill.core.errors import InputError
from distill.flow.conditioning import GUIDANCE_SCALE, without_guidance
from distill.flow.fields import ROUNDING, calls_per_sample
from distill.flow.interpolants import like
from distill.flow.solvers import on_linear_path
from distill.protocols import Cond, VelocityField
from distill.spec.guidancespec import ALWAYS, RESCALE, GuidanceSpec, Interval, bounds

TINY = 1e-12  # lower limit of a norm that is divided by

Scale: TypeAlias = float | Tensor  # a number, or one for each sample, [B, 1, ..., 1]
# (x_t, t, velocity with condition, other velocity, guidance scale) -> guided velocity; tensors [B, ...] and t [B]
Combine = Callable[[Tensor, Tensor, Tensor, Tensor, Scale], Tensor]


def cfg(x_t: Tensor, t: Tensor, v: Tensor, other: Tensor, scale: Scale) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""
    return other + scale * (v - other)


def zero_star(x_t: Tensor, t: Tensor, v: Tensor, other: Tensor, scale: Scale) -> Tensor:
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): the other velocity is first scaled to its best fit to v.

    The paper's zero velocities in the first steps are left out: they are wrong for an exact field.
    """
    v, other = _precise(v), _precise(other)
    s = _inner(v, other) / (_inner(other, other) + 1e-8)  # [B, 1, ...]
    return cfg(x_t, t, v, s * other, scale)


def apg(x_t: Tensor, t: Tensor, v: Tensor, other: Tensor, scale: Scale, *, norm_limit: float = math.inf) -> Tensor:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416), with eta = 0 and without momentum.

    The difference of the data predictions is shortened to the norm `norm_limit`, and its part along the data prediction
    is removed. With data = x_t - t v it is -t (v - other), so the velocity needs no division by t.
    """
    v, other = _precise(v), _precise(other)
    time = like(t, v).to(v.dtype)
    data, difference = x_t.to(v.dtype) - time * v, v - other
    if norm_limit < math.inf:
        difference = difference * (norm_limit / (time * _norm(difference)).clamp(min=TINY)).clamp(max=1)
    unit = data / _norm(data).clamp(min=TINY)
    return v + (scale - 1) * (difference - _inner(difference, unit) * unit)


def rescaled(x_t: Tensor, t: Tensor, v: Tensor, other: Tensor, scale: Scale, *, share: float = RESCALE) -> Tensor:
    """Guidance whose result is rescaled to the standard deviation of v (Lin et al. 2023, arXiv 2305.08891, eq. 15-16).

    share: of the rescaled velocity in the result; the rest is not rescaled. Samples need at least two values.
    """
    v = _precise(v)
    guided = cfg(x_t, t, v, _precise(other), scale)
    std, std_guided = (each.flatten(1).std(dim=1) for each in (v, guided))
    return share * like(std / std_guided.clamp(min=TINY), v) * guided + (1 - share) * guided


def renormalised(x_t: Tensor, t: Tensor, v: Tensor, other: Tensor, scale: Scale) -> Tensor:
    """Guidance whose result is rescaled to the norm of v, per sample (as in Lumina-Image 2.0 and Qwen-Image).

    These use the norm of each row of pixels or each token instead of that of the whole sample.
    """
    v = _precise(v)
    guided = cfg(x_t, t, v, _precise(other), scale)
    return guided * (_norm(v) / _norm(guided).clamp(min=TINY))


def two_scales(combine: Combine, boundary: float, second: float) -> Combine:
    """`combine` with another scale, `second`, at times below `boundary`: for two networks, each with its own scale."""

    def combined(x_t: Tensor, t: Tensor, v: Tensor, other: Tensor, scale: Scale) -> Tensor:
        early, late = (combine(x_t, t, v, other, each) for each in (scale, second))
        return torch.where(like(t >= boundary, v), early, late)

    return combined


def combination(guidance: GuidanceSpec) -> Combine | None:
    """The function of this form of guidance; None: that of the teacher's own pipeline."""
    match guidance.form:
        case None:
            return None
        case "cfg":
            return cfg
        case "zero_star":
            return zero_star
        case "apg":
            return apg if guidance.norm_limit is None else partial(apg, norm_limit=guidance.norm_limit)
        case "rescaled":
            return rescaled if guidance.rescale is None else partial(rescaled, share=guidance.rescale)
        case "renormalised":
            return renormalised


class Guided:
    """Guidance towards a condition: by default classifier-free guidance, v(null) + scale (v(cond) - v(null)).

    With scale 1 the result is bitwise that of the field. Any other scale takes one network call of at most 2B rows:
    first those with the condition, then those without it. Raises ValueError if the condition is empty or has other keys
    than the null condition.

    null: returns the null condition for as many rows as a condition has.
    guidance_scale: None: each sample has its own, cond["guidance_scale"] [B], which the field does not get.
    combine: how the two velocities are combined.
    interval: of linear-path time; samples at other times (see `bounds`) are not guided and take one row instead of two.
    waits: for the device, to find these samples; else they take two rows, of which the second is not used.
    """

    def __init__(
        self,
        field: VelocityField,
        null: Callable[[Cond], Cond],
        guidance_scale: float | None,
        combine: Combine = cfg,
        interval: Interval = ALWAYS,
        *,
        waits: bool = True,
    ) -> None:
        on_any_path = guidance_scale == 1 or (combine is cfg and interval == ALWAYS)
        self.field = field if on_any_path else on_linear_path(field)
        self.null, self.guidance_scale, self.combine, self.interval = null, guidance_scale, combine, interval
        self.waits = waits
        self.interpolant, self.t_range = self.field.interpolant, self.field.t_range

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.guidance_scale == 1:
            return self.field(x_t, t, cond)
        like(t, x_t)
        scale, cond = _scale(self.guidance_scale, x_t, cond)
        null = self.null(cond)
        if not cond or cond.keys() != null.keys():
            raise ValueError(
                f"guidance needs a condition to drop: cond has {sorted(cond)}, its null condition {sorted(null)}"
            )
        rows = _rows(t, self.interval) if self.waits else slice(None)
        both = {name: torch.cat([cond[name], null[name][rows]]) for name in cond}
        velocities = self.field(torch.cat([x_t, x_t[rows]]), torch.cat([t, t[rows]]), both)  # [B + n, ...]
        v, v_null = velocities[: len(x_t)], velocities[len(x_t) :]
        guided = _combined(self.combine, x_t, t, v, v_null, rows, scale)
        return guided if self.waits or self.interval == ALWAYS else _at_these(t, self.interval, guided, v)

    def for_training(self, *, by_sample: bool) -> "Guided":
        """The same, without waiting for the device. by_sample: with the scale of each sample, see above."""
        scale = None if by_sample else self.guidance_scale
        return Guided(self.field, self.null, scale, self.combine, self.interval, waits=False)

    def calls_at(self, t: Tensor) -> int:
        return (2 if _is_guided(t, self.guidance_scale, self.interval) else 1) * calls_per_sample(self.field, t)


class Autoguided:
    """Guidance away from a weaker model, with the same condition (Karras et al. 2024, arXiv 2406.02507).

    The velocity is v(weak) + scale (v - v(weak)). `guidance_scale`, `interval` and `waits` as for `Guided`; at times
    outside the interval, the weak model is not called.

    InputError if the weak model is not defined at all times at which the field is.
    """

    def __init__(
        self,
        field: VelocityField,
        weak: VelocityField,
        guidance_scale: float | None,
        interval: Interval = ALWAYS,
        *,
        waits: bool = True,
    ) -> None:
        self.field, self.weak = on_linear_path(field), on_linear_path(weak)
        self.guidance_scale, self.interval, self.waits = guidance_scale, interval, waits
        self.interpolant, self.t_range = self.field.interpolant, self.field.t_range
        (low, high), (weak_low, weak_high) = self.t_range, self.weak.t_range
        if weak_low > low + ROUNDING or weak_high < high - ROUNDING:
            raise InputError(
                f"the weak model is defined at times {weak_low:.4g} to {weak_high:.4g} of the linear path, but the "
                f"teacher at {low:.4g} to {high:.4g}; use a weak model that was trained on the same schedule"
            )

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        scale, cond = _scale(self.guidance_scale, x_t, cond)
        v = self.field(x_t, t, cond)
        rows = _rows(t, self.interval) if self.waits else slice(None)
        if self.guidance_scale == 1 or not len(t[rows]):
            return v
        v_weak = self.weak(x_t[rows], t[rows], {name: value[rows] for name, value in cond.items()})
        guided = _combined(cfg, x_t, t, v, v_weak, rows, scale)
        return guided if self.waits or self.interval == ALWAYS else _at_these(t, self.interval, guided, v)

    def for_training(self, *, by_sample: bool) -> "Autoguided":
        """As `Guided.for_training`."""
        scale = None if by_sample else self.guidance_scale
        return Autoguided(self.field, self.weak, scale, self.interval, waits=False)

    def calls_at(self, t: Tensor) -> int:
        calls = calls_per_sample(self.field, t)
        return calls + calls_per_sample(self.weak, t) if _is_guided(t, self.guidance_scale, self.interval) else calls


class Scaled:
    """Epsilon scaling (Ning et al. 2023, arXiv 2308.15321): the noise prediction is divided by `epsilon_scale`.

    With noise/kappa, the data prediction becomes (x_t - t noise/kappa)/(1 - t), and the velocity
    v/kappa - (1 - 1/kappa) x_t/(1 - t). With kappa 1 it is bitwise that of the field. InputError if the field is
    defined up to t = 1, pure noise, where this is infinite.
    """

    def __init__(self, field: VelocityField, epsilon_scale: float) -> None:
        self.field, self.epsilon_scale = field if epsilon_scale == 1 else on_linear_path(field), epsilon_scale
        self.interpolant, self.t_range = self.field.interpolant, self.field.t_range
        if epsilon_scale != 1 and self.t_range[1] > 1 - 2 * ROUNDING:
            raise InputError(
                f"epsilon_scale: {epsilon_scale:g} given, but the teacher is defined up to pure noise (t = 1), where "
                "the scaled velocity is infinite; use 1, or a teacher whose schedule ends before pure noise"
            )

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        v = self.field(x_t, t, cond)
        if self.epsilon_scale == 1:
            return v
        excess = (1 - 1 / self.epsilon_scale) / (1 - t.double())
        return (v.double() / self.epsilon_scale - like(excess, x_t) * x_t.double()).to(v.dtype)

    def calls_at(self, t: Tensor) -> int:
        return calls_per_sample(self.field, t)


def _inside(t: Tensor, interval: Interval) -> Tensor:
    low, high = bounds(interval)
    return (t > low) & (t <= high)


def _at_these(t: Tensor, interval: Interval, guided: Tensor, v: Tensor) -> Tensor:
    """The guided velocity at times within the interval, v at others."""
    return torch.where(like(_inside(t, interval), v), guided, v)


def _scale(given: float | None, x_t: Tensor, cond: Cond) -> tuple[Scale, Cond]:
    """The guidance scale, or those of the samples, and the condition without it."""
    return (like(cond[GUIDANCE_SCALE], x_t), without_guidance(cond)) if given is None else (given, cond)


def _rows(t: Tensor, interval: Interval) -> Tensor | slice:
    """The rows at times within the interval: their indices [n], or if it covers all times, a slice of all rows.

    Finding the indices waits for the device, because the number of rows of the network call depends on them.
    """
    return slice(None) if interval == ALWAYS else _inside(t, interval).nonzero().squeeze(1)


def _is_guided(t: Tensor, scale: float | None, interval: Interval) -> bool:
    """Whether any row takes a second network call."""
    return scale != 1 and bool(_inside(t, interval).any())


def _combined(
    combine: Combine, x_t: Tensor, t: Tensor, v: Tensor, other: Tensor, rows: Tensor | slice, scale: Scale
) -> Tensor:
    """v [B, ...] with its `rows` replaced by the guided velocity. other [n, ...]: the other velocity of these rows."""
    own = scale[rows] if isinstance(scale, Tensor) else scale
    guided = combine(x_t[rows], t[rows], v[rows], other, own).to(v.dtype)
    return guided if isinstance(rows, slice) else v.index_copy(0, rows, guided)


def _precise(v: Tensor) -> Tensor:
    return v.to(torch.promote_types(v.dtype, torch.float32))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product per sample, [B, 1, ..., 1]."""
    return like((a * b).flatten(1).sum(1), a)


def _norm(a: Tensor) -> Tensor:
    """The norm per sample, [B, 1, ..., 1]."""
    return _inner(a, a).sqrt()
