"""A random permutation of range(n) that is computed position by position, without memory for its n numbers.

It is the generalized Feistel cipher of Black and Rogaway (2002, "Ciphers with arbitrary finite domains"): a number
below a b >= n is written as l b + r, with l < a and r < b, and each round adds a hash of one part to the other, modulo
a or b. A result that is not below n is encrypted again until it is (cycle walking); with a = ceil(sqrt(n)), this is
rare.
"""

import math

import numpy as np
from numpy.typing import NDArray

from distill.flow.draws import key

ROUNDS = 8
MOST = 2**62  # maximum n
MULTIPLIERS = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)  # of the finalizer of MurmurHash3
SHIFT = np.uint64(33)


def at(positions: NDArray[np.int64], n: int, *parts: int | str) -> NDArray[np.int64]:
    """The numbers at these positions of a permutation of range(n), [m] int64, seeded by `parts`."""
    if not 0 < n <= MOST or (len(positions) and not 0 <= positions.min() <= positions.max() < n):
        raise ValueError(f"positions of a permutation of {n} numbers are 0 to {n - 1}")
    keys = [np.uint64(key("keyed permutation", *parts, turn)) for turn in range(ROUNDS)]
    a = math.isqrt(n - 1) + 1
    sides = np.uint64(a), np.uint64(-(-n // a))
    found = _encrypted(positions.astype(np.uint64), sides, keys)
    while len(outside := np.flatnonzero(found >= n)):
        found[outside] = _encrypted(found[outside], sides, keys)
    return found.astype(np.int64)


def _encrypted(
    numbers: NDArray[np.uint64], sides: tuple[np.uint64, np.uint64], keys: list[np.uint64]
) -> NDArray[np.uint64]:
    parts = list(np.divmod(numbers, sides[1]))
    for turn, round_key in enumerate(keys):
        mine, other = turn % 2, 1 - turn % 2
        parts[mine] = (parts[mine] + _hashed(parts[other] ^ round_key) % sides[mine]) % sides[mine]
    return parts[0] * sides[1] + parts[1]


def _hashed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mixes the bits of each number."""
    for multiplier in MULTIPLIERS:
        x = (x ^ (x >> SHIFT)) * multiplier
    return x ^ (x >> SHIFT)
