"""Parameters of which `make test` runs a few, and `make test-all` the others too."""

from collections.abc import Iterable

import pytest


def few(values: Iterable[object], *kept: object) -> list[object]:
    """The values as parameters of a test; those that are not among `kept` are marked as long."""
    rows = {value: value if isinstance(value, tuple) else (value,) for value in values}
    return [pytest.param(*row, marks=() if value in kept else pytest.mark.long) for value, row in rows.items()]
