"""Random numbers that are a function of (seed, row, position) and nothing else: Philox 4x32-10 (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3").

Each row of a batch has a stream of its own, so a process draws the rows it needs and no others, on the device where it
needs them, and finds the numbers that any other process, device or number of threads would find. For that, normal
numbers are made by additions, multiplications, divisions and square roots alone, which IEEE 754 defines to the last
bit; logarithms and cosines of libraries differ from device to device. Not to be compiled into fused kernels: a
multiplication and an addition that are rounded once give other bits.

PyTorch 2.14 and later have the generator as a private function; where it is missing or gives other bits than ours, the
same numbers are computed here by operations on integers, at six times the cost.
"""

from functools import cache

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
ROW = 32  # a row's stream begins at block row << ROW; a block is four words
UNIT = 2.0**-24

# Chebyshev fits in y = r^2, lowest power first. Errors: 7e-9, 5e-8, 7e-10 (relative).
SIN = 3.14159264, -5.16771008, 2.55007752, -0.59829129, 0.07765766  # sin(pi r) / r, |r| <= 1/2
COS = 0.99999995, -4.93479283, 4.05841135, -1.33187657, 0.21968961  # cos(pi r), |r| <= 1/2
ATANH = 1.0, 0.33333408, 0.19987402, 0.14962726  # atanh(r) / r, |r| <= (sqrt(2) - 1) / (sqrt(2) + 1)
SQRT_HALF = 0x3F3504F3  # the bits of sqrt(1/2) as float32
LN2 = 0.6931471805599453


def uniform(seed: int, rows: range, count: int, device: torch.device) -> Tensor:
    """Uniform on [0, 1), multiples of 2^-24: [len(rows), count] float32 on `device`. 0 <= seed < 2^63,
    rows below 2^31.
    """
    keys = torch.empty(len(rows), 2, dtype=torch.int64, device=device)
    keys[:, 0] = seed
    keys[:, 1] = torch.arange(rows.start, rows.stop, device=device) << ROW
    return (_native if _native_agrees(device.type) else _composed)(keys, count)


def normal(seed: int, rows: range, count: int, device: torch.device) -> Tensor:
    """Standard normal: [len(rows), count] float32 on `device`, by the Box-Muller transform of 24-bit numbers."""
    half = (count + 1) // 2
    u = uniform(seed, rows, 2 * half, device)
    radius = _minus_two_log(1 - u[:, :half]).sqrt_()
    r = u[:, half:] - 0.5  # the angle is 2 pi r
    y = r * r
    sin, cos = _polynomial(y, SIN).mul_(r), _polynomial(y, COS)  # of half the angle
    first = (sin * sin).mul_(-2.0).add_(1.0).mul_(radius)
    second = sin.mul_(cos).mul_(2.0).mul_(radius)
    return torch.cat([first, second[:, : count - half]], dim=1)


def _minus_two_log(w: Tensor) -> Tensor:
    """-2 ln w for w in [2^-24, 1], from the bits of w = 2^e m with sqrt(1/2) <= m < sqrt(2)."""
    bits = w.view(torch.int32)
    e = (bits - SQRT_HALF) >> 23
    m = (bits - (e << 23)).view(torch.float32)
    s = (m - 1) / (m + 1)  # ln m = 2 atanh(s)
    return _polynomial(s * s, ATANH).mul_(s).mul_(-4.0).sub_(e.to(torch.float32).mul_(2 * LN2))


def _polynomial(y: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's rule, rounded after every operation."""
    *rest, last = coefficients
    value = y * last
    for coefficient in reversed(rest[1:]):
        value.add_(coefficient).mul_(y)
    return value.add_(rest[0])


def _native(keys: Tensor, count: int) -> Tensor:
    """PyTorch's own kernel: keys [B, 2] are (seed, first block)."""
    from torch.func import _random

    return _random.uniform(keys.view(torch.uint64).unsqueeze(1), len(keys), count)


def _composed(keys: Tensor, count: int) -> Tensor:
    """The same by operations on int64, whose products wrap around as those of unsigned words do."""
    block = keys[:, 1:] + torch.arange((count + 3) // 4, device=keys.device)  # [B, blocks]
    key = [keys[:, :1] & MASK, (keys[:, :1] >> 32) & MASK]
    a, b, c, d = block & MASK, (block >> 32) & MASK, torch.zeros_like(block), torch.zeros_like(block)
    for _ in range(ROUNDS):
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b = ((right >> 32) & MASK) ^ b ^ key[0], right & MASK
        c, d = ((left >> 32) & MASK) ^ d ^ key[1], left & MASK
        key = [(each + weyl) & MASK for each, weyl in zip(key, WEYL, strict=True)]
    words = torch.stack([a, b, c, d], dim=2).flatten(1)[:, :count]  # [B, blocks, 4] -> [B, count]
    return (words & 0xFFFFFF).to(torch.float32) * UNIT


@cache
def _native_agrees(device_type: str) -> bool:
    """Whether PyTorch's kernel is there for this kind of device, and gives our bits."""
    keys = torch.tensor([[2**62 + 12345, 0], [2**62 + 12345, (7 << ROW) + 2]], device=device_type)
    cases = [(rows, count) for rows in (keys, keys[1:]) for count in (1, 1031, 1032)]  # kernels differ by row and count
    try:
        return all(torch.equal(_native(rows, count), _composed(rows, count)) for rows, count in cases)
    except (ImportError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
