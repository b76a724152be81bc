"""Whole rows of a batch by shares: the method of largest remainders."""

from collections.abc import Sequence

from distill.core.errors import InputError


def rows_by_share(batch_size: int, shares: Sequence[float]) -> list[int]:
    """How many rows of a batch each source gives: as near to its share as whole rows come, at least one."""
    counts = [int(batch_size * share) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda i: counts[i] - batch_size * shares[i])
    for i in by_rest[: batch_size - sum(counts)]:
        counts[i] += 1
    if min(counts) < 1:
        raise InputError(
            f"a part of {min(shares):g} of batch_size={batch_size} is less than one pair; use a larger batch or "
            "other parts"
        )
    return counts
