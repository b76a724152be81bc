"""Sampling grids, time windows and distributions of training times. All times are in [0, 1], 0 is data, 1 is noise.

A time distribution ("law") is given by its inverse distribution function, which maps uniform numbers u [B] to times t
[B]. It is increasing, so stratified u give stratified t. Grids are float64, decreasing, and end at 0.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from distill.core.text import suggest
from distill.flow.waiting import any_known, on

# --- grids ---


def uniform_grid(steps: int, t_max: float = 1.0, t_min: float = 0.0) -> Tensor:
    """A uniform grid from t_max to 0, [steps + 1], on which every time except the last is at least t_min.

    t_min: the lowest time at which the field is defined. If t_max/steps < t_min, only the first `steps` times are
    evenly spaced, from t_max to t_min. The last step then goes from t_min to the data prediction at 0.
    """
    _check_steps(steps)
    if not 0 <= t_min < t_max <= 1:
        raise ValueError(f"times must satisfy 0 <= t_min < t_max <= 1, got t_min={t_min}, t_max={t_max}")
    if t_max / steps >= t_min:
        return t_max * (torch.arange(steps, -1, -1, dtype=torch.float64) / steps)
    return _ending_at_zero(torch.linspace(t_max, t_min, steps, dtype=torch.float64))


def sigmoid_grid(steps: int, sharpness: float) -> Tensor:
    """A grid from 1 to 0, [steps + 1], that is dense at both ends (Kim et al. 2024, arXiv 2410.07815).

    t_i = (s(k/2 - k i/N) - s(-k/2)) / (s(k/2) - s(-k/2)), where s is the logistic function, N = `steps` and k is the
    sharpness. The grid becomes uniform as k goes to 0.
    """
    _check_steps(steps)
    if sharpness <= 0:
        raise ValueError(f"sharpness must be positive, got {sharpness}")
    i = torch.arange(steps + 1, dtype=torch.float64)
    bent = torch.tanh(sharpness / 4 * (steps - 2 * i) / steps)  # s(x) = 1/2 + tanh(x/2)/2; tanh is exactly symmetric
    return (1 + bent / bent[0]) / 2


def shifted_grid(steps: int, shift: float = 1.0) -> Tensor:
    """A grid from 1 to 0, [steps + 1], with t = k u / (1 + (k - 1) u) for even u and k = `shift` (Esser et al. 2024,
    arXiv 2403.03206, eq. 23): k > 1 makes it denser near the noise, where a larger image needs more steps.
    """
    u = uniform_grid(steps)
    return shift * u / (1 + (shift - 1) * u)


# --- windows: `borders` are [K + 1], from 1 to 0, like `uniform_grid(K)`; window k lies between borders k and k + 1 ---


def window(t: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """Returns start t_s and end t_e of the window that contains each t [B]: t_e < t <= t_s, both [B].

    A border belongs to the window below it, also if rounding has changed it by up to 1e-6. t = 0 belongs to the last
    window.
    """
    ascending = on(borders, t.device).flip(0)
    above = torch.searchsorted(ascending, t.double() - 1e-6).clamp(1, len(ascending) - 1)
    return ascending[above].to(t.dtype), ascending[above - 1].to(t.dtype)


def window_grids(borders: Tensor, most: int = 16) -> dict[int, list[float]]:
    """Returns sampling grids that contain all borders, for N = K ... `most` steps; only for N = K if K > `most`.

    Each window has N // K equal steps, and the first N % K windows have one more (PeRFlow, Yan et al. 2024, arXiv
    2405.07510).
    """
    num_windows, grids = len(borders) - 1, {}
    for steps in range(num_windows, max(num_windows, most) + 1):
        each, extra = divmod(steps, num_windows)
        inside = (
            torch.linspace(t_s, t_e, each + (k < extra) + 1, dtype=torch.float64)[:-1]
            for k, (t_s, t_e) in enumerate(pairwise(borders.tolist()))
        )
        grids[steps] = _ending_at_zero(torch.cat([*inside])).tolist()
    return grids


# --- distributions of training times ---


def uniform(u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform on [low, high]."""
    if not 0 <= low < high <= 1:
        raise ValueError(f"need 0 <= low < high <= 1, got low={low}, high={high}")
    return _as_time(low + (high - low) * _checked(u), u)


def discrete(u: Tensor, levels: int) -> Tensor:
    """Uniform on {1/levels, 2/levels, ..., 1}."""
    return _as_time(((_checked(u) * levels).floor() + 1) / levels, u)


def one_of(count: int, u: Tensor) -> Tensor:
    """Uniform integers in {0, ..., count - 1}, [B] int64, from u [B] in [0, 1). Rounding never gives `count` itself."""
    return (u * count).long()


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """logit(t) ~ N(mean, std^2) (Esser et al. 2024, arXiv 2403.03206).

    On the linear path, logit(t) = ln(sigma/alpha). EDM's training distribution is mean=-1.2, std=1.2.
    """
    if std <= 0:
        raise ValueError(f"std must be positive, got {std}")
    return _as_time(torch.sigmoid(mean + std * torch.special.ndtri(_checked(u))), u)


def u_shaped(u: Tensor, sharpness: float = 4.0, margin: float = 1e-5) -> Tensor:
    """p(t) proportional to cosh(sharpness (t - 1/2)) (Lee et al. 2024, arXiv 2405.20320).

    Times are scaled linearly from [0, 1] to [margin, 1 - margin].
    """
    if sharpness <= 0 or not 0 <= margin < 0.5:
        raise ValueError(f"need sharpness > 0 and 0 <= margin < 0.5, got {sharpness}, {margin}")
    half = math.sinh(sharpness / 2)
    t = 0.5 + torch.asinh((2 * _checked(u) - 1) * half) / sharpness
    return _as_time(margin + t * (1 - 2 * margin), u)


def exp10(u: Tensor) -> Tensor:
    """p(t) = ln(10) 10^t / 9, which favours noisy times."""
    return _as_time(torch.log10(1 + 9 * _checked(u)), u)


def nearer(t: Tensor, closeness: float, k: float = 8.0, b: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns times s < t [B] and the difference t - s [B], by Easy Consistency Tuning (Geng et al. 2024, 2406.14548).

    With the noise-to-data ratio r = t / (1 - t): r_s = max(0, r (1 - closeness (1 + k sigmoid(-b r)))). In the paper,
    closeness = q^-(stage + 1). The difference is accurate even if s and t are equal in float32.
    """
    ratio = t / (1 - t)
    gap = ratio * (closeness * (1 + k * torch.sigmoid(-b * ratio))).clamp(max=1)
    earlier = (ratio - gap).clamp(min=0)
    return earlier / (1 + earlier), gap / ((1 + ratio) * (1 + earlier))


def law(name: str, mu: float | None = None, sigma: float | None = None) -> Callable[[Tensor], Tensor]:
    """Returns the time distribution called `name`. Raises ValueError if there is none.

    mu (None: 0) and sigma (None: 1): mean and standard deviation of logit_normal; ValueError with any other.
    """
    laws: dict[str, Callable[[Tensor], Tensor]] = {"uniform": uniform, "u_shaped": u_shaped, "exp10": exp10}
    if name == "logit_normal":
        return partial(logit_normal, mean=0.0 if mu is None else mu, std=1.0 if sigma is None else sigma)
    if name not in laws:
        raise ValueError(f"unknown time law '{name}': {suggest(name, [*laws, 'logit_normal'])}")
    if mu is not None or sigma is not None:
        raise ValueError(f"mu and sigma have no effect with time_law: {name}; remove them or use logit_normal")
    return laws[name]


def _checked(u: Tensor) -> Tensor:
    if u.ndim != 1 or u.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"u must be [B] in float32 or float64, got {list(u.shape)} in {u.dtype}")
    if any_known(~((u >= 0) & (u <= 1))):
        raise ValueError(f"u must be within [0, 1], got [{u.min():.6g}, {u.max():.6g}]")
    return u.double()


def _as_time(t: Tensor, u: Tensor) -> Tensor:
    return t.clamp(0, 1).to(u.dtype)  # every distribution maps to [0, 1]; clamping corrects rounding errors


def _ending_at_zero(t: Tensor) -> Tensor:
    return torch.cat([t, t.new_zeros(1)])


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
