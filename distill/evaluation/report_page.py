"""The report: one self-contained HTML file, made from the files of a run, which may be unfinished. Needs no torch."""

import base64
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from distill.core import records
from distill.core.atomic import write_atomic
from distill.core.text import printable
from distill.evaluation import charts
from distill.evaluation.charts import Curve
from distill.evaluation.curves import Thinned
from distill.reports import comparison_table, rounds_table, run_status
from distill.reports.rounds_table import Round
from distill.runs import machine
from distill.runs.results import (
    BESIDE_FD,
    Results,
    Row,
    calls,
    cells,
    columns,
    describe,
    number,
    of_run,
    picture,
    verdicts,
)
from distill.runs.run_store import RunPaths, read_events

LIBRARIES = ("torch", "diffusers", "safetensors", "numpy", "scipy", "scikit-learn", "pot", "datasets", "pydantic")
MAX_CURVES = 3  # per stage
MAX_NAMES = 50  # logged values per stage that are read, from which the curves are chosen
MAX_WARNINGS = 100
MAX_PICTURES = 64 * 2**20  # bytes of all embedded pictures together
OF_FEATURES = "FD-", "diversity-"  # columns of features
MAX_PANELS = 4  # of the chart of guidance scales
MAGNIFIED = 1200  # pixels; wider pictures are of large images, which are smoothed when they are shown smaller


@dataclass(frozen=True)
class StageRow:
    """The state of one stage."""

    name: str
    kind: str
    state: str
    amount: str


@dataclass(frozen=True)
class Picture:
    """A picture of the first samples of a row."""

    title: str
    note: str
    source: str
    role: str
    pixelated: bool
    """whether its single pixels are shown"""


@dataclass(frozen=True)
class GroupTable:
    """The scores of each row by group of prompts."""

    columns: list[str]
    rows: list[tuple[Row, list[str]]]


@dataclass(frozen=True)
class Evaluation:
    """The section of an evaluate stage."""

    description: str
    columns: list[str]
    rows: list[tuple[Row, list[str]]]
    chart: str
    guidance: str
    """chart of the teacher at several guidance scales; "": it was measured at one only"""
    pictures: list[Picture]
    straightness: list[tuple[str, str, float]]  # network, value or a dash, width of the bar in percent
    more: str
    """folder with the pictures that are not shown; "": all are shown"""
    captions: list[str]
    """the prompts of the first samples"""
    picture_columns: int | None
    """of pictures that are shown in the order of these prompts"""
    groups: GroupTable | None


@dataclass(frozen=True)
class Rounds:
    """The section of reflow rounds."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]
    chart: str
    warnings: list[str]
    note: str = rounds_table.NOTE


@dataclass(frozen=True)
class ComparisonSection:
    """The section of a comparison of recipes."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]
    chart: str
    note: str


@dataclass
class TrainingCurve:
    """The progress and the logged values of a stage."""

    unit: str = "images"
    done: int = 0
    total: int = 0
    curves: dict[str, Thinned] = field(default_factory=dict)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distill"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2")


def write(run: RunPaths) -> Path:
    """Write the run's report.html and return its path. For a comparison, its table and figure are written too."""
    kinds, trainings, warnings = _events(run)
    found = of_run(run)
    room = MAX_PICTURES
    shown: dict[str, Evaluation] = {}
    for name, results in found.items():
        pictures, more, room = _pictures(run.stage(name).root, results, room)
        shown[name] = _evaluation(results, pictures, f"stages/{name}/pictures" if more else "")
    wholes = [results for results in found.values() if rounds_table.round_of(results) is None]
    page = _template().render(
        name=printable(run.name),
        stages=[_stage(run, name, kind, trainings.get(name), name in found) for name, kind in kinds.items()],
        evaluations=shown,
        headlines=[headline(results) for results in wholes or found.values()],
        rounds=_rounds(rounds_table.rounds(found)),
        losses={name: chart for name, training in trainings.items() if (chart := _losses(training))},
        warnings=warnings,
        spec=_spec(run),
        environment=_environment(run),
        comparison=_comparison(run),  # after all that may raise errors, because this writes two files
        files=_files(run),
    )
    write_atomic(run.report, page)
    return run.report


def _spec(run: RunPaths) -> str:
    try:
        return records.read_text(run.spec)
    except FileNotFoundError:
        return ""


def headline(results: Results) -> str:
    """The result in short: the student with the fewest network calls (the best of those), compared to its teacher."""
    students = [row for row in results.usual if row.role == "student"]
    fine = next(row for row in results.rows if row.fine)
    what = results.distance or "RMS to the teacher"

    if not students:
        return f"The teacher reaches {what} {number(fine.value)} with {fine.nfe} network calls."
    best = min(students, key=lambda row: (row.nfe, row.value))
    said = f"With {calls(best.nfe)}, {best.network} reaches {what} {number(best.value)}"
    coarse = [row for row in results.usual if row.role == "teacher" and not row.fine]
    if results.distance is not None:
        as_good = [row for row in coarse if row.value <= best.value]
        if as_good:
            first = min(as_good, key=lambda row: (row.nfe, row.value))
            said += f"; the teacher needs {calls(first.nfe)} of {first.solver} for {number(first.value)}, and reaches"
        elif coarse:
            last = max(coarse, key=lambda row: (row.nfe, -row.value))
            said += f"; the teacher reaches {number(last.value)} with {calls(last.nfe)} of {last.solver}, and"
        else:
            said += "; the teacher reaches"
        said += f" {number(fine.value)} with {fine.nfe} network calls of {fine.solver}"
    if any(row is best for row, _ in results.unbeaten):
        said += f". {best.network} does not beat the best baseline with so few calls"
    faster = best.images_per_second / fine.images_per_second
    times = f"{faster:.1f}" if faster < 10 else f"{faster:.0f}"
    return f"{said}. {best.network} generates {times} times as many samples per second."


def _pictures(folder: Path, results: Results, room: int) -> tuple[list[Picture], bool, int]:
    """The pictures of an evaluation, each once, in at most `room` bytes.

    Also returns whether some were left out, and how many bytes are left.
    """
    what, more = results.distance or "RMS", False
    pictures: dict[str, Picture] = {}
    shown = [("real images", "", results.real_picture, "real")] if results.real_picture else []
    for row in results.rows:
        note = f"{row.nfe} call{'s' if row.nfe > 1 else ''}, {what} {number(row.value)}"
        shown.append((row.label, note, row.picture, row.role))
    for title, note, name, role in shown:
        if name in pictures or (png := picture(folder, name, room)) is None:
            continue
        if not png:
            more = True
            continue
        room -= len(png)
        is_small = not results.vector and _width(png) <= MAGNIFIED
        pictures[name] = Picture(title, note, _image(png, "png"), role, is_small)
    return list(pictures.values()), more, room


def _evaluation(results: Results, pictures: list[Picture], more: str) -> Evaluation:
    straight = {row.network: row.straightness for row in results.rows}
    widest = max((value for value in straight.values() if value is not None), default=0.0) or 1.0
    return Evaluation(
        description=describe(results) + verdicts(results),
        columns=columns(results),
        rows=[(row, cells(results, row)) for row in results.rows],
        chart=_image(charts.quality(results).encode(), "svg+xml"),
        guidance=_guidance(results),
        pictures=pictures,
        straightness=[
            (name, "\u2013", 0.0) if value is None else (name, number(value), 100 * value / widest)
            for name, value in straight.items()
        ],
        more=more,
        groups=_groups(results),
        captions=[printable(each) for each in results.captions],
        picture_columns=results.picture_columns,
    )


def swept(results: Results) -> dict[str, list[Curve]]:
    """The teacher's values at several guidance scales, by name; empty if it was measured at one only."""
    fine = next(row for row in results.rows if row.fine)
    rows = {row.guidance_scale: row for row in results.rows if row.guidance_scale is not None}
    if not rows:
        return {}
    rows = dict(sorted({results.guidance_scale: fine, **rows}.items()))
    values = {results.distance or "RMS": [row.value for row in rows.values()]}
    for name in sorted(fine.metrics, key=lambda name: name.startswith(OF_FEATURES)):  # scores first
        known = [row.metrics[name] for row in rows.values() if name in row.metrics]
        if len(known) == len(rows) and not name.startswith(BESIDE_FD):
            values[name] = known
    return {name: [Curve("teacher", list(rows), each)] for name, each in list(values.items())[:MAX_PANELS]}


def _guidance(results: Results) -> str:
    panels = swept(results)
    return _image(charts.panels(panels, "guidance scale").encode(), "svg+xml") if panels else ""


def _groups(results: Results) -> GroupTable | None:
    """The scores by group of prompts, for each row."""
    names = dict.fromkeys((group, name) for row in results.rows for group, each in row.groups.items() for name in each)
    if not names:
        return None
    rows = [
        (row, [number(row.groups[group][name]) if name in row.groups.get(group, {}) else "-" for group, name in names])
        for row in results.rows
    ]
    return GroupTable([f"{group}: {name}" for group, name in names], rows)


def _rounds(found: list[Round]) -> Rounds | None:
    if not found:
        return None
    panels = {  # round 0 is the first teacher
        title: [Curve(name, *zip(*points, strict=True)) for name, points in curves.items()]
        for title, curves in rounds_table.curves(found).items()
    }
    return Rounds(
        columns=rounds_table.columns(found),
        rows=[(each.after.network, rounds_table.cells(found, each)) for each in found],
        chart=_image(charts.panels(panels, "round").encode(), "svg+xml") if panels else "",
        warnings=[each.warning for each in found if each.warning],
    )


def _comparison(run: RunPaths) -> ComparisonSection | None:
    """The section of a comparison, if the run is one. Its figure and table are also written to files."""
    found = comparison_table.found(run)
    if found is None:
        return None
    label = f"{comparison_table.quantity(found)}; dashed: the teacher, with its number of steps"
    chart = charts.ranks(comparison_table.ranked(found), comparison_table.teacher(found), label)
    write_atomic(run.comparison_figure, chart)
    write_atomic(run.comparison_table, comparison_table.markdown(found))
    return ComparisonSection(
        columns=comparison_table.columns(found),
        rows=comparison_table.rows(found),
        chart=_image(chart.encode(), "svg+xml"),
        note=comparison_table.note(found),
    )


def _events(run: RunPaths) -> tuple[dict[str, str], dict[str, TrainingCurve], list[str]]:
    """From the run's events, in bounded memory: the kind of each stage, its logged values, and all warnings."""
    kinds: dict[str, str] = {}
    trainings: dict[str, TrainingCurve] = {}
    warnings: dict[str, None] = {}  # in order, without duplicates
    for event in read_events(run):
        match event["event"]:
            case "created":
                kinds.update(event.get("stages", {}))
            case "stage started":
                kinds.setdefault(event["stage"], event.get("kind", ""))
            case "warning":
                if len(warnings) <= MAX_WARNINGS:
                    warnings[f"{event['label']}: {event['text']}"] = None
            case "progress" if event["label"] in kinds:
                training = trainings.setdefault(event["label"], TrainingCurve())
                training.unit = event.get("unit", training.unit)
                training.done, training.total = event["done"], event.get("total", training.total)
                for name, value in event.get("logs", {}).items():
                    curve = training.curves.get(name)
                    if curve is None and len(training.curves) < MAX_NAMES:
                        curve = training.curves[name] = Thinned()
                    if curve is not None:
                        curve.add(float(event["done"]), value)
    said = list(warnings)
    return kinds, trainings, said if len(said) <= MAX_WARNINGS else [*said[:MAX_WARNINGS], "more warnings: see events/"]


def _stage(run: RunPaths, name: str, kind: str, training: TrainingCurve | None, has_results: bool) -> StageRow:
    state = "done" if has_results else run_status.stage_state(run, name)
    if state == "waiting" and training is not None:
        state = "begun"
    amount = f"{training.done:,} of {training.total:,} {training.unit}" if training else ""
    return StageRow(name, kind, state, amount)


def _losses(training: TrainingCurve) -> str:
    """A chart of the values that a stage has logged, losses first; "" if there is nothing to draw."""
    filled = {name: curve for name, curve in training.curves.items() if curve.at}
    names = sorted(filled, key=lambda name: "loss" not in name)  # losses first, else in the order of the events
    curves = [Curve(name, *filled[name].drawn()) for name in names[:MAX_CURVES]]
    return _image(charts.losses(curves, training.unit).encode(), "svg+xml") if curves else ""


def _environment(run: RunPaths) -> list[tuple[str, str]]:
    """The entries of env.json that matter for the results."""
    env = machine.load(run)
    known = {"distill": env.distill, "commit": env.commit, "python": env.python, "platform": env.platform}
    known |= {name: str(count) for name, count in (("cpus", env.cpus), ("threads", env.threads)) if count is not None}
    known |= {name: env.version(name) for name in LIBRARIES}
    return [(name, value) for name, value in known.items() if value]


def _files(run: RunPaths) -> list[tuple[str, str]]:
    """Label and path, relative to the run, of each file that exists."""
    named = [
        ("spec", run.spec),
        ("events", run.events),
        ("events of an earlier version", run.old_events),
        ("environment", run.env),
        ("comparison", run.comparison_table),
        ("comparison figure", run.comparison_figure),
        *((f"student {path.name}", path) for path in _folders(run.root / "students")),
        *((f"stage {path.name}", path) for path in _folders(run.root / "stages")),
    ]
    return [(printable(label), printable(str(path.relative_to(run.root)))) for label, path in named if path.exists()]


def _folders(parent: Path) -> Iterable[Path]:
    return sorted(path for path in parent.glob("*") if path.is_dir() and not path.name.startswith("."))


def _width(png: bytes) -> int:
    """Of a picture, in pixels."""
    return int.from_bytes(png[16:20], "big")


def _image(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
