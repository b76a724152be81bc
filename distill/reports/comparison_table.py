"""Comparisons of recipes: the record comparison.json, and the table of results. Does not import torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from rich.table import Table

from distill.core import records
from distill.core.errors import InputError
from distill.core.field_types import FrozenModel, Line, ScriptLine
from distill.core.markdown import code, escape
from distill.core.space import human
from distill.runs import machine, results
from distill.runs.progress import duration
from distill.runs.results import Results, Row, number
from distill.runs.run_store import RunPaths, read_events
from distill.spec.model import Name

UNBEATEN = " (b)"  # marks a value that does not beat the best baseline


class Measured(FrozenModel):
    """The measurements of a training in a rehearsal."""

    seconds_per_image: PositiveFloat
    memory: NonNegativeInt
    """bytes of a process: weights, gradients, optimizer, averages, activations"""
    teacher_calls: NonNegativeFloat
    """calls of its teacher's network per image, including guidance"""
    steps: Annotated[list[PositiveInt], Field(max_length=1000)]
    """numbers of steps of its student; empty: any number"""


class TrainedPart(FrozenModel):
    """A train stage of a chain."""

    stage: Name
    recipe: Line
    images: PositiveInt
    measured: Measured

    @property
    def seconds(self) -> float:
        """Expected training time in seconds."""
        return self.images * self.measured.seconds_per_image


class ComparedRecipe(FrozenModel):
    """A recipe in a comparison: the chain of stages that makes its student."""

    name: Name
    """name of the stage that trains its student, the last of its parts"""
    recipe: Line
    parts: list[TrainedPart] = Field(min_length=1, max_length=1000)
    pair_calls: NonNegativeFloat
    """network calls for the pairs that it trains on, counted in full even if other recipes use the same pairs"""

    @property
    def images(self) -> int:
        return sum(part.images for part in self.parts)

    @property
    def memory(self) -> int:
        return max(part.measured.memory for part in self.parts)

    @property
    def teacher_calls(self) -> float:
        """Calls of the teacher's network for its pairs and during training."""
        return self.pair_calls + sum(part.images * part.measured.teacher_calls for part in self.parts)


class Comparison(FrozenModel):
    """The content of comparison.json, written with the run's spec."""

    format: Literal[1] = 1
    command: ScriptLine
    budget_minutes: PositiveFloat
    """of training, for each recipe"""
    evaluation: Name
    """the stage that measures all students"""
    entries: list[ComparedRecipe] = Field(min_length=1, max_length=1000)

    @property
    def measured(self) -> dict[str, Measured]:
        """Train stage -> its measurements."""
        return {part.stage: part.measured for entry in self.entries for part in entry.parts}


@dataclass(frozen=True)
class FoundComparison:
    """A finished comparison with its results."""

    comparison: Comparison
    results: Results
    seconds: dict[str, float]
    """name of an entry -> seconds of its training"""
    machine: str
    """on which device and with which versions it was measured"""
    date: str


COMPARISON: records.Schema[Comparison] = records.Schema(Comparison)


def load(run: RunPaths) -> Comparison | None:
    """The comparison of a run; None if the run is not a comparison. InputError if its record is damaged."""
    try:
        return records.load(run.comparison, COMPARISON, "delete that file: the run remains, without a comparison")
    except FileNotFoundError:
        return None


def found(run: RunPaths) -> FoundComparison | None:
    """The results of a comparison; None if the run is not a comparison or is not evaluated yet.

    Raises InputError if the record or the results are damaged.
    """
    comparison = load(run)
    measured = None if comparison is None else results.load_results(run.stage(comparison.evaluation))
    if comparison is None or measured is None:
        return None
    names = {row.network for row in measured.usual if row.role == "student" and not row.fine}
    if missing := [entry.name for entry in comparison.entries if entry.name not in names]:
        raise InputError(
            f"{run.stage(comparison.evaluation).root / results.FILE_NAME} cannot be used: it has no row of "
            f"'{missing[0]}', which {run.comparison.name} lists; delete it and done.json to evaluate again"
        )
    sessions, ended, device = Sessions(), None, ""
    for event in read_events(run, ["stage started", "resumed", "progress"]):
        sessions.add(event)
        if event["event"] == "stage started":
            device = event.get("device", device)
        elif event["event"] == "progress" and event["label"] == comparison.evaluation:
            ended = event["time"]
    seconds = {e.name: sum(sessions.seconds(p.stage) for p in e.parts) for e in comparison.entries}
    date = "" if ended is None else datetime.fromtimestamp(ended).astimezone().strftime("%Y-%m-%d")
    return FoundComparison(comparison, measured, seconds, _machine(run, measured, device), date)


class Sessions:
    """Sums up the time of the training loops of stages, from the events of a run."""

    def __init__(self) -> None:
        # stage -> (images at the beginning, images at the end, images per second) of each process that trained it
        self._of: dict[str, list[tuple[int, int, float]]] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        """Add the next event. Events must be added oldest first."""
        match event["event"]:
            case "stage started":
                self._of.setdefault(event["stage"], []).append((0, 0, 1.0))
            case "resumed" if sessions := self._of.get(event["stage"]):
                sessions[-1] = (event["images"], event["images"], 1.0)
            case "progress" if (sessions := self._of.get(event["label"])) and event.get("per_second", 0) > 0:
                sessions[-1] = (sessions[-1][0], event["done"], event["per_second"])

    def seconds(self, stage: str) -> float:
        """Training time of a stage in seconds. Work that was lost after a kill is not counted."""
        total, limit = 0.0, math.inf
        for begin, end, rate in reversed(self._of.get(stage, [])):
            total += max(0.0, min(end, limit) - begin) / rate
            limit = min(limit, begin)
        return total


def _machine(run: RunPaths, measured: Results, device: str) -> str:
    env = machine.load(run)
    cores = f"{env.threads or '?'} of {env.cpus or '?'} cores of {env.cpu}"
    own = f"distill {env.distill or '?'}{f', commit {env.commit}' if env.commit else ''}"
    return f"{cores if measured.device == 'cpu' or not device else device}, torch {env.version('torch') or '?'}, {own}"


def quantity(found: FoundComparison) -> str:
    """Name of the compared quantity."""
    return found.results.distance or "RMS"


def columns(found: FoundComparison) -> list[str]:
    """Column titles for the numbers of `rows`, in the same order."""
    first, *further = _steps(found)
    return [
        "images",
        f"{quantity(found)}@{first}",
        *(f"@{n}" for n in further),
        "best baseline",
        "S",
        "training",
        "memory",
        "teacher calls",
    ]


def rows(found: FoundComparison) -> list[tuple[str, list[str]]]:
    """(name, numbers as text) of each row. The rows of the teacher, one for each of its solvers, come first."""
    coarse = [row for row in found.results.usual if row.role == "teacher" and not row.fine]
    fine = [row for row in found.results.usual if row.role == "teacher" and row.fine]
    solvers = dict.fromkeys(row.solver for row in coarse)
    shown = [(f"teacher, {solver}", [row for row in coarse if row.solver == solver]) for solver in solvers]
    shown += [(f"teacher, {row.solver}", [row]) for row in fine]
    lines = [(name, ["-", *_values(found, each), "-", _straightness(each), "-", "-", "-"]) for name, each in shown]
    for entry in found.comparison.entries:
        each = _of(found, entry)
        trained = found.seconds[entry.name]
        cost = [duration(trained) if trained else "-", human(entry.memory), f"{entry.teacher_calls:,.0f}"]
        values = [*_values(found, each), _baseline(found, each), _straightness(each)]
        lines.append((titled(entry), [f"{entry.images:,}", *values, *cost]))
    return lines


def titled(entry: ComparedRecipe) -> str:
    """The name of an entry, followed by its recipes if the name does not say them."""
    recipes = list(dict.fromkeys(part.recipe for part in entry.parts))
    return (
        entry.name
        if len(recipes) == 1 and short(recipes[0]) == entry.name
        else f"{entry.name} ({', '.join(map(short, recipes))})"
    )


def short(recipe: str) -> str:
    """The name of a recipe without its folder and without .py."""
    return PurePosixPath(recipe).stem


def ranked(found: FoundComparison) -> dict[str, list[tuple[int, float]]]:
    """Recipe -> [(steps, value)], sorted by the value at the recipe's smallest number of steps, best first."""
    each = {titled(e): [(row.steps, row.value) for row in _of(found, e)] for e in found.comparison.entries}
    return dict(sorted(each.items(), key=lambda line: line[1][0][1]))


def teacher(found: FoundComparison) -> list[tuple[str, float]]:
    """(name, value) of the teacher's rows, of its solvers the best at each number of network calls.

    Without values of 0: the RMS of the fine solver, which is the reference.
    """
    measured = [row for row in found.results.usual if row.role == "teacher" and row.value > 0]
    best = {row.nfe: min(r.value for r in measured if r.nfe == row.nfe) for row in measured}
    shown = [row for row in measured if row.fine or row.value == best[row.nfe]]
    return [
        (f"{row.steps}" if row.solver == "euler" and not row.fine else f"{row.solver} {row.steps}", row.value)
        for row in shown
    ]


def _of(found: FoundComparison, entry: ComparedRecipe) -> list[Row]:
    """The rows of an entry's student with its own sampler, fewest steps first."""
    of_it = [row for row in found.results.usual if row.role == "student" and row.network == entry.name]
    return sorted((row for row in of_it if not row.fine), key=lambda row: row.steps)


def _steps(found: FoundComparison) -> list[int]:
    return sorted({row.steps for row in found.results.usual})


def _values(found: FoundComparison, measured: Sequence[Row]) -> list[str]:
    unbeaten = [row for row, _ in found.results.unbeaten]
    values = {row.steps: number(row.value) + (UNBEATEN if row in unbeaten else "") for row in measured}
    return [values.get(steps, "-") for steps in _steps(found)]


def _baseline(found: FoundComparison, measured: Sequence[Row]) -> str:
    """The best value of the teacher at no more network calls than the student's fewest, with its solver."""
    base = found.results.baseline(measured[0]) if measured else None
    return "-" if base is None else f"{number(base.value)} {base.solver}"


def _straightness(measured: Sequence[Row]) -> str:
    value = measured[0].straightness if measured else None
    return "-" if value is None else number(value)


def note(found: FoundComparison) -> str:
    """An explanation of the columns."""
    marks = (
        " Best baseline: the best value of the teacher with as many network calls as the student's fewest steps need, "
        "and its solver."
    )
    if found.results.unbeaten:
        marks += f" {UNBEATEN.strip()}: not better than the best baseline at that number of network calls."
    return (
        f"@N: with N steps.{marks} S: straightness, the mean square difference between velocity and mean velocity "
        "along the network's own paths; 0: straight; a flow map has no paths. Training: time of the training loop, "
        f"with a budget of {found.comparison.budget_minutes:g} minutes each. Memory: of one process, for weights, "
        "gradients, optimizer, EMA weights and activations. Teacher calls: network calls for the pairs, counted in "
        "full for each recipe, and during training."
    )


def markdown(found: FoundComparison) -> str:
    """The table with its notes as Markdown."""
    heads = ["recipe", *columns(found)]
    lines = [
        ["@".join(map(escape, head.split("@"))) for head in heads],
        ["---", *["---:"] * (len(heads) - 1)],
        *([escape(name), *numbers] for name, numbers in rows(found)),
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    said = [code(found.comparison.command), escape(found.machine), found.date]
    return f"{table}\n\n{note(found)} {escape(results.describe(found.results))}\n\n{'; '.join(filter(None, said))}\n"


def table(found: FoundComparison) -> Table:
    """The table with its notes for a terminal."""
    shown = Table(title="comparison", caption=note(found), title_justify="left", caption_justify="left")
    shown.add_column("recipe")
    for name in columns(found):
        shown.add_column(name, justify="right")
    for name, cells in rows(found):
        shown.add_row(name, *cells, style=None if name.startswith("teacher,") else "bold")
    return shown
