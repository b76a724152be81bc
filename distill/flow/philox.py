"""The counter-based generator Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Each random number is a function of (seed, row, position). Each row of a batch has its own stream, so a process computes
only the rows that it needs, on the device that needs them. The numbers are bitwise equal for every process, device and
number of threads. Therefore normal numbers are computed by additions, multiplications, divisions and square roots only:
IEEE 754 defines their results exactly, while library functions such as log and cos differ between devices. Do not
compile this code into fused kernels: a fused multiply-add rounds once instead of twice and gives other bits.

PyTorch 2.14 and later contain this generator as a private function. If it is missing or gives other bits, the same
numbers are computed here with integer operations, which takes six times as long.
"""

from functools import cache

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
ROW = 32  # the stream of a row starts at block `row << ROW`; a block is four 32-bit words
UNIT = 2.0**-24

# Coefficients of Chebyshev fits in y = r^2, lowest power first. Errors: 7e-9 relative, 5e-8 absolute, 1.4e-9 relative.
SIN = 3.14159264, -5.16771008, 2.55007752, -0.59829129, 0.07765766  # sin(pi r) / r, |r| <= 1/2
COS = 0.99999995, -4.93479283, 4.05841135, -1.33187657, 0.21968961  # cos(pi r), |r| <= 1/2
ATANH = 1.0, 0.33333408, 0.19987402, 0.14962726  # atanh(r) / r, |r| <= (sqrt(2) - 1) / (sqrt(2) + 1)
SQRT_HALF = 0x3F3504F3  # the bits of sqrt(1/2) as float32
LN2 = 0.6931471805599453


def uniform(seed: int, rows: range, count: int, device: torch.device) -> Tensor:
    """Uniform numbers on [0, 1), multiples of 2^-24: [len(rows), count] float32 on `device`.

    seed: 0 <= seed < 2^63. rows: below 2^31.
    """
    keys = torch.empty(len(rows), 2, dtype=torch.int64, device=device)
    keys[:, 0] = seed
    keys[:, 1] = torch.arange(rows.start, rows.stop, device=device) << ROW
    return (_native if _native_agrees(device.type) else _composed)(keys, count)


def normal(seed: int, rows: range, count: int, device: torch.device) -> Tensor:
    """Standard normal numbers [len(rows), count] float32 on `device`: the Box-Muller transform of `uniform`."""
    half = (count + 1) // 2
    u = uniform(seed, rows, 2 * half, device)
    radius = _sqrt(_minus_two_log(1 - u[:, :half]))
    r = u[:, half:] - 0.5  # the angle is 2 pi r
    y = r * r
    sin, cos = _polynomial(y, SIN).mul_(r), _polynomial(y, COS)  # of half the angle, pi r
    first = (sin * sin).mul_(-2.0).add_(1.0).mul_(radius)
    second = sin.mul_(cos).mul_(2.0).mul_(radius)
    return torch.cat([first, second[:, : count - half]], dim=1)


def _minus_two_log(w: Tensor) -> Tensor:
    """-2 ln w for w in [2^-24, 1]: e and m are read from the bits of w = 2^e m, with sqrt(1/2) <= m < sqrt(2)."""
    bits = w.view(torch.int32)
    e = (bits - SQRT_HALF) >> 23
    m = (bits - (e << 23)).view(torch.float32)
    s = (m - 1) / (m + 1)  # ln m = 2 atanh(s)
    return _polynomial(s * s, ATANH).mul_(s).mul_(-4.0).sub_(e.to(torch.float32).mul_(2 * LN2))


def _sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root of float32 numbers.

    On Intel CPUs, PyTorch computes square roots of long vectors with a library (MKL) whose last bit may be wrong. In
    float64, that is too small to change the result after rounding to float32.
    """
    return x.double().sqrt_().to(torch.float32)


def _polynomial(y: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Evaluates a polynomial by Horner's rule, with rounding after every operation."""
    *rest, last = coefficients
    value = y * last
    for coefficient in reversed(rest[1:]):
        value.add_(coefficient).mul_(y)
    return value.add_(rest[0])


def _native(keys: Tensor, count: int) -> Tensor:
    """Uniform numbers by PyTorch's kernel. keys [B, 2]: seed and first block of each row."""
    from torch.func import _random

    return _random.uniform(keys.view(torch.uint64).unsqueeze(1), len(keys), count)


def _composed(keys: Tensor, count: int) -> Tensor:
    """The same numbers by int64 operations: products wrap around like those of unsigned integers."""
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
    """Whether PyTorch's kernel exists for this type of device and gives the same bits as `_composed`."""
    keys = torch.tensor([[2**62 + 12345, 0], [2**62 + 12345, (7 << ROW) + 2]], device=device_type)
    # PyTorch may use different kernels for different numbers of rows and columns.
    cases = [(rows, count) for rows in (keys, keys[1:]) for count in (1, 1031, 1032)]
    try:
        return all(torch.equal(_native(rows, count), _composed(rows, count)) for rows, count in cases)
    except (ImportError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
