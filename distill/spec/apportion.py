"""Divides the rows of a batch by shares, with the method of largest remainders."""

from collections.abc import Sequence

from distill.core.errors import InputError


def rows_by_share(batch_size: int, shares: Sequence[float]) -> list[int]:
    """Number of rows of a batch from each source, as close to its share as possible.

    Raises InputError if a source would get no row.
    """
    counts = [int(batch_size * share) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda i: counts[i] - batch_size * shares[i])
    for i in by_rest[: batch_size - sum(counts)]:
        counts[i] += 1
    if min(counts) < 1:
        raise InputError(
            f"the fraction {min(shares):g} of batch_size={batch_size} is less than one pair per batch; increase "
            "batch_size or this fraction"
        )
    return counts
