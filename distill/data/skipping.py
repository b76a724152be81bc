"""The report about items of a data set that are skipped because they cannot be used."""

from collections.abc import Sequence

from torch.utils.data import get_worker_info

from distill.core import printing
from distill.core.errors import InputError


def report(what: str, names: Sequence[str], *, found: int, total: int, limit: int, todo: str) -> None:
    """Warns that `found` of `total` items are skipped. InputError if these are more than `limit`, or all.

    what: says how many they are. names: of the first of them. todo: how the user can correct the data.

    Worker processes do not warn: they tell the main process what they have found, see `source.Skipping`.
    """
    shown = ", ".join(names) + (", ..." if found > len(names) else "")
    if found > limit or found == total:
        advice = f", or increase data.max_unreadable (now {limit})" if found < total else ""
        raise InputError(f"{what}: {shown}; {todo}{advice}")
    if get_worker_info() is None:
        printing.warn(f"{what} and are skipped: {shown}")
