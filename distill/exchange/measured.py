"""The metrics of a student as a table, for its model card."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from distill.spec.kinds import BASELINE, network_calls


@dataclass(frozen=True)
class MeasuredStudent:
    """The metrics of a card as a table: names of the columns, and (NFE, cells) of each row."""

    names: list[str]
    rows: list[tuple[int, list[str]]]
    unbeaten: list[tuple[int, str]]
    """NFE and metric, where it is not better than that of the best baseline"""

    @property
    def has_baselines(self) -> bool:
        return any(name.startswith(BASELINE) for name in self.names)


def of(metrics: Mapping[str, float], sampler: str) -> MeasuredStudent | None:
    """The table of these metrics, which have names like FD-digits@2; None if there are none."""
    found: dict[int, dict[str, float]] = {}
    for key, value in metrics.items():
        name, steps = _at(key)
        found.setdefault(steps, {})[name] = value
    names = list(dict.fromkeys(_at(key)[0] for key in metrics))
    rows: list[tuple[int, list[str]]] = []
    unbeaten: list[tuple[int, str]] = []
    for steps, values in sorted(found.items()):
        nfe = network_calls(sampler, steps)
        rows.append((nfe, [f"{values[name]:.4g}" if name in values else "" for name in names]))
        for name in [each for each in values if each.startswith(BASELINE)]:
            quantity = name.removeprefix(f"{BASELINE} ")
            if quantity in values and not values[quantity] < values[name]:
                unbeaten.append((nfe, quantity))
    return MeasuredStudent(names, rows, unbeaten) if rows else None


def _at(key: str) -> tuple[str, int]:
    """(name, number of steps) of a metric like FD-digits@2. The number is 0 if the key has none."""
    found = re.fullmatch(r"(.*)@([0-9]{1,6})", key)
    return (found[1], int(found[2])) if found else (key, 0)
