"""Tables of rounds of reflow: how straightness and distance to the data change. Does not import torch.

A round is measured by an evaluation that compares a flow with the flow before it. Both start from the same noise and
use the fine solver.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from distill.core.printing import say_table
from distill.runs.progress import Progress
from distill.runs.results import Results, Row, number, of_run
from distill.runs.run_store import RunPaths


@dataclass(frozen=True)
class Round:
    """The measurements of a flow and of the flow before it."""

    stage: str
    """name of the evaluation"""
    distance: str | None
    """name of the distance, see `Results.distance`"""
    before: Row
    """the flow before, with the fine solver"""
    after: Row
    """this flow, with the fine solver"""
    few: dict[int, Row]
    """number of steps -> this flow with its own sampler"""

    @property
    def warning(self) -> str | None:
        """A warning if this flow is further from the data than the flow before; else None."""
        before, after = self.before.distance, self.after.distance
        if before is None or after is None or after <= before:
            return None
        return (
            f"with the fine solver, {self.after.network} is further from the data than the previous flow: "
            f"{self.distance} {number(before)} -> {number(after)}. Errors add up over rounds: use fewer (--rounds), "
            "more pairs or solver steps (count and steps of the pairs), or real data (--forward, --data-weight)"
        )


def round_of(results: Results) -> Round | None:
    """The round that an evaluation measured; None if it measured none."""
    fine = [row for row in results.rows if row.fine]
    if len(fine) != 2:  # the first is the teacher
        return None
    before, after = fine
    few = {row.steps: row for row in results.usual if row.network == after.network and not row.fine}
    return Round(results.stage, results.distance, before, after, few)


def rounds(found: Mapping[str, Results]) -> list[Round]:
    """The rounds among a run's evaluations (stage -> results), ordered by name with numbers in numeric order."""
    each = [round_ for results in found.values() if (round_ := round_of(results)) is not None]
    return sorted(each, key=lambda round_: [(len(part), part) for part in re.findall(r"\d+|\D+", round_.stage)])


def columns(found: Sequence[Round]) -> list[str]:
    """Column titles for `cells`."""
    what = found[0].distance
    distance = [f"{what}, fine solver", *map(_named, _steps(found))] if what else []
    return ["straightness", *distance, "RMS to previous flow, fine solver", "RMS, 1 step", "transport"]


def cells(found: Sequence[Round], each: Round) -> list[str]:
    """The numbers of a round as text."""
    before, after = each.before, each.after
    distance = []
    if each.distance is not None:
        few = [each.few[count].distance if count in each.few else None for count in _steps(found)]
        distance = [_change(before.distance, after.distance), *map(_or_dash, few)]
    one = each.few[1].rms if 1 in each.few else None
    return [
        _change(before.straightness, after.straightness),
        *distance,
        _or_dash(after.rms),
        _or_dash(one),
        " -> ".join("-" if x is None else f"{x:.4f}" for x in (before.transport, after.transport)),  # changes are small
    ]


def curves(found: Sequence[Round]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Title of a panel -> name of a curve -> [(round, value)], without missing values. Round 0 is the first teacher."""
    ends = [found[0].before, *(each.after for each in found)]
    panels: dict[str, dict[str, list[tuple[int, float | None]]]] = {
        "straightness": {"straightness": [(i, row.straightness) for i, row in enumerate(ends)]},
        "transport": {"transport": [(i, row.transport) for i, row in enumerate(ends)]},
    }
    if found[0].distance is not None:
        few = {
            _named(n): [(i, each.few[n].distance) for i, each in enumerate(found, 1) if n in each.few]
            for n in _steps(found)
        }
        panels = {
            found[0].distance: {"fine solver": [(i, row.distance) for i, row in enumerate(ends)], **few},
            **panels,
        }
    shown = {
        title: {name: [(i, y) for i, y in points if y is not None] for name, points in each.items()}
        for title, each in panels.items()
    }
    filled = {title: {name: points for name, points in each.items() if points} for title, each in shown.items()}
    return {title: each for title, each in filled.items() if each}


NOTE = (
    "A -> B: before and after the round, with the same noise; each round has its own noise. Straightness: mean square "
    "difference between velocity and mean velocity along the flow's paths; 0: straight. RMS: root mean square "
    "difference between the ends of the paths. Transport: mean square of data minus noise; only errors can increase it."
)


def table(found: Sequence[Round]) -> Table:
    """All rounds as a table for a terminal."""
    shown = Table(title="rounds", caption=NOTE, title_justify="left", caption_justify="left")
    shown.add_column("flow")
    for name in columns(found):
        shown.add_column(name, justify="right")
    for each in found:
        shown.add_row(each.after.network, *cells(found, each))
    return shown


def say(measured: Results, run: RunPaths, progress: Progress) -> None:
    """If an evaluation measured a round, print the table of the rounds so far, and the warning if there is one."""
    if (last := round_of(measured)) is None:
        return
    say_table(table(rounds(of_run(run))))
    if last.warning is not None:
        progress.warn(last.warning)


def _steps(found: Sequence[Round]) -> list[int]:
    return sorted({count for each in found for count in each.few})


def _named(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"


def _change(before: float | None, after: float | None) -> str:
    return f"{_or_dash(before)} -> {_or_dash(after)}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else number(value)
