"""The charts of the report, as SVG. They have no dates or random names, so the same data gives the same bytes."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from distill.runs.results import Results, number

INK, FAINT, GRID = "#33363b", "#8a8d91", "#e7e6e2"
TEACHER = "#8a8d91"
SHADES = LinearSegmentedColormap.from_list("steps", ("#e3a48f", "#c96f54", "#9c3c24", "#5e2213"))  # few to many
STUDENTS = ("#b4472e", "#2f5d8a", "#5b7f3b", "#8a5a9e", "#b08a2e")
STYLE = {
    "svg.fonttype": "none",  # text is not converted to paths; the viewer's sans-serif font is used
    "svg.hashsalt": "distill",
    "text.parse_math": False,  # a $ in a name does not start a formula
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#c9c9c4",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "^", "v", "s", "P")  # of the solvers of the teacher
FEW = 6  # up to so many networks, every point has its value beside it


@dataclass(frozen=True)
class Curve:
    """A curve, e.g. of the values that a stage has logged."""

    name: str
    at: Sequence[float] | Sequence[int]
    """position of each value, in images or rounds"""
    values: Sequence[float]


def quality(results: Results) -> str:
    """Distance against network calls, both logarithmic; without a reference, RMS to the teacher instead of distance."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(6.4, 3.9)
        lowest = {row.nfe: min(r.value for r in results.rows if r.nfe == row.nfe) for row in results.rows}
        colours = colours_of(results)
        crowded = len(colours) > FEW
        for network, colour in colours.items():
            rows = [row for row in results.rows if row.network == network and row.value > 0]  # 0 has no logarithm
            rows = [row for row in rows if row.guidance_scale is None]
            usual = [row for row in rows if not row.fine and row.is_usual]
            for i, solver in enumerate(dict.fromkeys(row.solver for row in usual)):  # one, except for the teacher
                line = sorted((row for row in usual if row.solver == solver), key=lambda row: row.nfe)
                label = network if line[0].role == "student" else line[0].label
                axes.plot(
                    [r.nfe for r in line], [r.value for r in line], color=colour, lw=1.6 if i == 0 else 1, label=label,
                    ls=LINES[i % len(LINES)], marker=MARKERS[i % len(MARKERS)], ms=5,
                )  # fmt: skip
            for along in dict.fromkeys(row.along for row in rows if row.along):
                same = [row for row in rows if row.along == along]
                label = f"{network}{same[0].way}"
                axes.plot(
                    [r.nfe for r in same], [r.value for r in same], "s", color=colour, ms=5, mfc="white", label=label
                )
            for row in rows:
                if row.fine:
                    label = f"{network}, {row.solver}"
                    axes.plot([row.nfe], [row.value], "D", color=colour, ms=5.5, mfc="white", label=label)
                # Labels: above the points of the teacher's first solver, below those of the best student per column,
                # and beside those of other students.
                place, align = (5, 4), "left"
                if crowded and row.role == "student" and row.value != lowest[row.nfe]:
                    continue
                if row.role == "teacher" and not row.fine and row.solver != usual[0].solver:
                    continue
                if row.role == "student":
                    place, align = ((0, -14), "center") if row.value == lowest[row.nfe] else ((8, -1), "left")
                axes.annotate(
                    number(row.value), (row.nfe, row.value), place, textcoords="offset points", ha=align, color=colour,
                    fontsize=8,
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        if any(row.value > 0 for row in results.rows):
            axes.set_yscale("log")
            _plain_powers(axes.yaxis)
        axes.margins(x=0.07, y=0.16)
        axes.set_xlabel("network calls per sample (NFE)")
        axes.set_ylabel(results.distance or "RMS to the teacher's endpoint")
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if crowded else {}
        if axes.get_legend_handles_labels()[1]:  # none if all values are 0
            axes.legend(frameon=False, fontsize=9, **beside)
        return _svg(figure)


def panels(curves: Mapping[str, Sequence[Curve]], label: str) -> str:
    """Panels with few values each, by title. label: of their horizontal axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.3 * len(curves), 2.6), layout="constrained")
        FigureCanvasSVG(figure)
        for i, (title, shown) in enumerate(curves.items()):
            axes = figure.add_subplot(1, len(curves), i + 1)
            for place, curve in enumerate(shown):
                colour = STUDENTS[place % len(STUDENTS)]
                axes.plot(curve.at, curve.values, "-o", color=colour, ms=4, lw=1.4, label=curve.name)
            values = [value for curve in shown for value in curve.values]
            if min(values) > 0 and max(values) > 20 * min(values):
                axes.set_yscale("log")
                _plain_powers(axes.yaxis)
            else:
                axes.set_ylim(0, 1.1 * max(values) or 1)
            axes.set_title(title, fontsize=9, loc="left", color=INK)
            axes.set_xlabel(label, fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.tick_params(labelsize=8)
            if len(shown) > 1:
                axes.legend(frameon=False, fontsize=8)
        return _svg(figure)


def ranks(lines: Mapping[str, Sequence[tuple[int, float]]], teacher: Sequence[tuple[str, float]], label: str) -> str:
    """A horizontal line for each recipe, the first on top, with a dot at its value for each number of steps.

    lines: (steps, value) by recipe. teacher: (label, value) of vertical lines. label: of the axis.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.2, 1.5 + 0.36 * len(lines))
        steps = sorted({count for points in lines.values() for count, _ in points})
        last = len(lines) - 1
        for name, value in teacher:
            axes.axvline(value, color=TEACHER, lw=0.9, ls=(0, (4, 3)), zorder=1)
            axes.annotate(
                name, (value, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points", ha="left",
                va="bottom", rotation=40, color=TEACHER, fontsize=7.5,
            )  # fmt: skip
        for i, points in enumerate(lines.values()):
            values = [value for _, value in points]
            axes.plot([min(values), max(values)], [last - i] * 2, color=GRID, lw=2, zorder=2)
        for count, shade in zip(steps, SHADES(np.linspace(0, 1, len(steps))), strict=True):
            dots = [(value, last - i) for i, points in enumerate(lines.values()) for n, value in points if n == count]
            at, heights = zip(*dots, strict=True)
            axes.scatter(at, heights, s=38, color=shade, label=str(count), zorder=3, linewidths=0)
        axes.set_yticks(range(last, -1, -1), list(lines))
        axes.set_ylim(-0.6, last + 0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xscale("log")
        _plain_powers(axes.xaxis)
        axes.set_xlabel(label)
        axes.legend(
            title="steps", frameon=False, fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
        )
        return _svg(figure)


def losses(curves: Sequence[Curve], unit: str) -> str:
    """The values that a stage has logged, one panel for each curve. unit: of the horizontal axis."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.3 * len(curves), 2.3), layout="constrained")
        FigureCanvasSVG(figure)
        for i, curve in enumerate(curves):
            axes = figure.add_subplot(1, len(curves), i + 1)
            axes.plot(curve.at, curve.values, color=STUDENTS[1], lw=1.3)
            if min(curve.values) > 0 and max(curve.values) > 20 * min(curve.values):
                axes.set_yscale("log")
                _plain_powers(axes.yaxis)
            axes.set_title(curve.name, fontsize=9, loc="left", color=INK)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.set_xlabel(unit, fontsize=8)
            axes.set_xlim(left=0)
            axes.tick_params(labelsize=8)
        return _svg(figure)


def _plain_powers(axis: Axis) -> None:
    """Label a logarithmic axis with numbers such as 0.1 and 20, not with formulas, as matplotlib does by default."""
    low, high = axis.get_data_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def colours_of(results: Results) -> Mapping[str, str]:
    """A colour for each network; the teacher's is grey."""
    students = dict.fromkeys(row.network for row in results.rows if row.role == "student")
    colours = {name: STUDENTS[i % len(STUDENTS)] for i, name in enumerate(students)}
    return {results.rows[0].network: TEACHER, **colours}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
