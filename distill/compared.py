"""What a comparison is of and what it found: comparison.json, and from it and the run's files a table. No torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from rich.table import Table

from distill import results
from distill.progress import duration
from distill.results import Results, Row, number
from distill.space import human
from distill.spec import Frozen, Name
from distill.store import RunPaths, read_events, read_json


class Measured(Frozen):
    """What a rehearsal found of a training."""

    seconds_per_image: PositiveFloat
    memory: NonNegativeInt
    """bytes of a process: weights, gradients, optimizer, averages, activations"""
    teacher_calls: NonNegativeFloat
    """of its teacher's network, for an image; guidance counted"""
    steps: list[PositiveInt]
    """that its student is made for; empty: any number"""


class Part(Frozen):
    """A train stage of a chain."""

    stage: Name
    recipe: str
    images: PositiveInt
    measured: Measured

    @property
    def seconds(self) -> float:
        """That it is to take."""
        return self.images * self.measured.seconds_per_image


class Entry(Frozen):
    """A recipe in a comparison: the chain of stages that makes its student."""

    name: Name
    """of the stage of its student, the last of its parts"""
    recipe: str
    parts: list[Part]
    pair_calls: NonNegativeFloat
    """network calls for the pairs that it trains on, also where others train on them too"""

    @property
    def images(self) -> int:
        return sum(part.images for part in self.parts)

    @property
    def memory(self) -> int:
        return max(part.measured.memory for part in self.parts)

    @property
    def teacher_calls(self) -> float:
        """For its pairs and while it trains."""
        return self.pair_calls + sum(part.images * part.measured.teacher_calls for part in self.parts)


class Comparison(Frozen):
    """The content of comparison.json, written with the run's spec."""

    format: Literal[1] = 1
    command: str
    budget_minutes: PositiveFloat
    """of training, for each recipe"""
    evaluation: Name
    """the stage that measures all"""
    entries: list[Entry]

    @property
    def measured(self) -> dict[str, Measured]:
        """By train stage."""
        return {part.stage: part.measured for entry in self.entries for part in entry.parts}


@dataclass(frozen=True)
class Found:
    """A comparison that was made."""

    comparison: Comparison
    results: Results
    seconds: dict[str, float]
    """that training took, by entry"""
    machine: str
    date: str


def load(run: RunPaths) -> Comparison | None:
    """What a run compares; None: it is no comparison."""
    return Comparison.model_validate_json(run.comparison.read_bytes()) if run.comparison.exists() else None


def found(run: RunPaths) -> Found | None:
    """What a run has found, once its evaluation has; None: it is no comparison, or not as far."""
    comparison = load(run)
    measured = None if comparison is None else results.load(run.stage(comparison.evaluation))
    if comparison is None or measured is None:
        return None
    events = list(read_events(run))
    seconds = {e.name: sum(training_seconds(events, p.stage) for p in e.parts) for e in comparison.entries}
    ends = [e["time"] for e in events if e.get("event") == "progress" and e.get("label") == comparison.evaluation]
    date = datetime.fromtimestamp(ends[-1]).astimezone().strftime("%Y-%m-%d") if ends else ""
    return Found(comparison, measured, seconds, _machine(run, measured, events), date)


def training_seconds(events: Iterable[Mapping[str, Any]], stage: str) -> float:
    """That the loop of a train stage has taken, until its checkpoints counted: what a kill undid is left out."""
    sessions: list[tuple[int, int, float]] = []  # images at the beginning and at the end, a second
    for event in events:
        match event.get("event"):
            case "stage started" if event["stage"] == stage:
                sessions.append((0, 0, 1.0))
            case "resumed" if event["stage"] == stage and sessions:
                sessions[-1] = (event["images"], event["images"], 1.0)
            case "progress" if event["label"] == stage and sessions and event["per_second"] > 0:
                sessions[-1] = (sessions[-1][0], event["done"], event["per_second"])
    total, limit = 0.0, math.inf
    for begin, end, rate in reversed(sessions):
        total += max(0.0, min(end, limit) - begin) / rate
        limit = min(limit, begin)
    return total


def _machine(run: RunPaths, measured: Results, events: Sequence[Mapping[str, Any]]) -> str:
    env = read_json(run.env) if run.env.exists() else {}
    devices = [event["device"] for event in events if event.get("event") == "stage started"]
    cores = f"{env.get('threads', '?')} of {env.get('cpus', '?')} cores of {env.get('cpu', 'an unknown CPU')}"
    torch = {name.lower(): version for name, version in env.get("packages", {}).items()}.get("torch", "?")
    return f"{cores if measured.device == 'cpu' or not devices else devices[-1]}, torch {torch}"


def quantity(found: Found) -> str:
    """What is compared."""
    return found.results.distance or "RMS"


def columns(found: Found) -> list[str]:
    """Heads of the numbers of a row, in the order of `rows`."""
    first, *further = _steps(found)
    return [
        "images",
        f"{quantity(found)}@{first}",
        *(f"@{n}" for n in further),
        "S",
        "training",
        "memory",
        "teacher calls",
    ]


def rows(found: Found) -> list[tuple[str, list[str]]]:
    """The name of each row, and its numbers as text: the teacher by each of its solvers first."""
    measured = found.results.usual
    coarse = [row for row in measured if row.role == "teacher" and not row.fine]
    fine = [row for row in measured if row.role == "teacher" and row.fine]
    shown = [("teacher, euler", coarse)] if coarse else []
    shown += [(f"teacher, {row.solver}", [row]) for row in fine]
    lines = [(name, ["-", *_values(found, each), _straightness(each), "-", "-", "-"]) for name, each in shown]
    for entry in found.comparison.entries:
        each = _of(found, entry)
        trained = found.seconds[entry.name]
        cost = [duration(trained) if trained else "-", human(entry.memory), f"{entry.teacher_calls:,.0f}"]
        lines.append((titled(entry), [f"{entry.images:,}", *_values(found, each), _straightness(each), *cost]))
    return lines


def titled(entry: Entry) -> str:
    """Its name and, where that says less, its recipes."""
    recipes = list(dict.fromkeys(part.recipe for part in entry.parts))
    return (
        entry.name
        if len(recipes) == 1 and short(recipes[0]) == entry.name
        else f"{entry.name} ({', '.join(map(short, recipes))})"
    )


def short(recipe: str) -> str:
    """The name of a recipe without its folder, and without the .py of a file."""
    return PurePosixPath(recipe).stem


def ranked(found: Found) -> dict[str, list[tuple[int, float]]]:
    """[(steps, value)] of each recipe, the best at its fewest steps first."""
    each = {titled(e): [(row.steps, row.value) for row in _of(found, e)] for e in found.comparison.entries}
    return dict(sorted(each.items(), key=lambda line: line[1][0][1]))


def teacher(found: Found) -> list[tuple[str, float]]:
    """The teacher's values by name, but for one of 0: by its fine solver, to which RMS is measured."""
    measured = [row for row in found.results.usual if row.role == "teacher" and row.value > 0]
    return [(f"{row.solver} {row.steps}" if row.fine else f"{row.steps}", row.value) for row in measured]


def _of(found: Found, entry: Entry) -> list[Row]:
    """The rows of its student by its own sampler, fewest steps first."""
    of_it = [row for row in found.results.usual if row.role == "student" and row.network == entry.name]
    return sorted((row for row in of_it if not row.fine), key=lambda row: row.steps)


def _steps(found: Found) -> list[int]:
    return sorted({row.steps for row in found.results.usual})


def _values(found: Found, measured: Sequence[Row]) -> list[str]:
    values = {row.steps: number(row.value) for row in measured}
    return [values.get(steps, "-") for steps in _steps(found)]


def _straightness(measured: Sequence[Row]) -> str:
    value = measured[0].straightness if measured else None
    return "-" if value is None else number(value)


def note(found: Found) -> str:
    """What the columns are."""
    return (
        f"@N: at N steps. S: mean square difference between velocity and mean velocity along the network's own "
        f"paths, 0 = straight; a flow map has none. Training: time of the loop, of "
        f"{found.comparison.budget_minutes:g} minutes for each. Memory: of a process, for weights, gradients, "
        "optimizer, averages and activations. Teacher calls: of a network, for the pairs, counted in full for each "
        "recipe, and while it trains."
    )


def markdown(found: Found) -> str:
    """All of it for a page."""
    heads = ["recipe", *columns(found)]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *([name, *cells] for name, cells in rows(found))]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    said = [f"`{found.comparison.command}`", found.machine, found.date]
    return f"{table}\n\n{note(found)} {results.describe(found.results)}\n\n{'; '.join(filter(None, said))}\n"


def table(found: Found) -> Table:
    """All of it for a terminal."""
    shown = Table(title="comparison", caption=note(found), title_justify="left", caption_justify="left")
    shown.add_column("recipe")
    for name in columns(found):
        shown.add_column(name, justify="right")
    for name, cells in rows(found):
        shown.add_row(name, *cells, style=None if name.startswith("teacher,") else "bold")
    return shown
