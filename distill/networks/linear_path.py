"""How a network of any schedule is called as a velocity network of the linear path x = (1 - t) data + t noise.

This file is shipped inside student folders: it imports torch only.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Native = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], the network's own time [B]) -> its prediction, like x


def log_sigmas(alphas_cumprod: list[float]) -> Tensor:
    """log(sigma/alpha) [N] float64 of a VP table, increasing. Zero terminal SNR is treated as 1e-12."""
    table = torch.tensor(alphas_cumprod, dtype=torch.float64, device="cpu").clamp(min=1e-12)
    return 0.5 * (torch.log1p(-table) - torch.log(table))


def vp_velocity(native: Native, prediction: str, table: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The velocity [B, ...] of a VP network at x [B, ...] and t [B] float64 in [0, 1], finite at both ends.

    prediction: epsilon, sample or v_prediction. table: log(sigma/alpha) [N]. With sigma = t / (1 - t), the network is
    called at n(sigma), linear in log sigma between the table's entries and held at its ends, on
    x / sqrt((1 - t)^2 + t^2).
    """
    table = table.to(x.device)
    log_sigma = (torch.log(t) - torch.log1p(-t)).clamp(table[0], table[-1])  # [B]; infinite at the ends before
    below = (torch.searchsorted(table, log_sigma) - 1).clamp(0, len(table) - 2)
    n = below + (log_sigma - table[below]) / (table[below + 1] - table[below])
    alpha, sigma = torch.sigmoid(-2 * log_sigma).sqrt(), torch.sigmoid(2 * log_sigma).sqrt()
    scale = 1 / ((1 - t).square() + t.square()).sqrt()
    output = native(over(scale, x) * x, n.float()).to(x.dtype)
    c, d = {
        "epsilon": (torch.zeros_like(t), torch.ones_like(t)),
        "sample": (torch.ones_like(t), torch.zeros_like(t)),
        "v_prediction": (-sigma, alpha),
    }[prediction]
    # scale x = alpha data + sigma noise, output = c data + d noise:
    #   data = (d scale x - sigma output) / det,  noise = (alpha output - c scale x) / det
    # v = (x - data) / t = (noise - x) / (1 - t): for each t the one that does not divide by a small number
    det, late = alpha * d - sigma * c, t >= 0.5
    of_x = torch.where(late, (1 - d * scale / det) / t, (-c * scale / det - 1) / (1 - t))
    of_output = torch.where(late, sigma / det / t, alpha / det / (1 - t))
    return over(of_x, x) * x + over(of_output, x) * output


def edm_velocity(
    native: Native, sign: int, sigma_data: float, sigma_min: float, sigma_max: float, x: Tensor, t: Tensor
) -> Tensor:
    """The velocity of an EDM network F, as `vp_velocity`. sign: of F as in Karras et al. 2022 (arXiv 2206.00364)."""
    # D = c_skip x_edm + c_out F with x_edm = x / (1 - t), sigma = t / (1 - t), put into v = (x - D) / t: t cancels
    q = t.square() + (sigma_data * (1 - t)).square()
    sigma = (t / (1 - t)).clamp(sigma_min, sigma_max)
    output = native(over(q.rsqrt(), x) * x, (torch.log(sigma) / 4).float()).to(x.dtype)
    return over((t - sigma_data**2 * (1 - t)) / q, x) * x - over(sign * sigma_data * q.rsqrt(), x) * output


def ve_velocity(native: Native, sigma_min: float, sigma_max: float, x: Tensor, t: Tensor) -> Tensor:
    """The velocity of a score network of images in [0, 1] on a variance-exploding path, as `vp_velocity`.

    x / (1 - t) = data + 2 sigma noise with sigma = t / (2 (1 - t)), as the data here is in [-1, 1]. Above sigma_max,
    where this goes to infinity, the network is called on 2 sigma_max x / t instead, which is equal at sigma_max.
    """
    sigma = (t / (1 - t) / 2).clamp(sigma_min, sigma_max)
    scale = torch.minimum(1 / (1 - t), 2 * sigma_max / t)
    output = native((over(scale, x) * x + 1) / 2, sigma.float()).to(x.dtype)
    # noise = -sigma output, data = scale x - 2 sigma noise, v = (x - data) / t = (noise - x) / (1 - t): see vp_velocity
    late = t >= 0.5
    of_x = torch.where(late, (1 - scale) / t, -1 / (1 - t))
    of_output = torch.where(late, -2 * sigma.square() / t, -sigma / (1 - t))
    return over(of_x, x) * x + over(of_output, x) * output


def over(coefficient: Tensor, x: Tensor) -> Tensor:
    """[B] float64 -> [B, 1, ..., 1] in x's dtype."""
    return coefficient.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
