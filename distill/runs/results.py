"""The results of an evaluation, as data and as a table. Does not import torch."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, model_validator
from rich.table import Table

from distill.core import records
from distill.core.errors import InputError
from distill.core.field_types import NAME, FrozenModel, Line, Positive
from distill.core.png import is_png
from distill.runs.run_store import RunPaths, StagePaths
from distill.spec.kinds import BASELINE

FILE_NAME = "results.json"
PICTURE = re.compile(r"(?:pictures/)?[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.png")
HISTOGRAM = "histogram KL"  # a distance, see `evaluation.metrics.histogram`
BESIDE_FD = "KID-", "precision-", "recall-"  # columns of features that a narrow place leaves out
PICTURE_BYTES = 64 * 2**20  # largest size of a picture


def _plain(name: str) -> str:
    if PICTURE.fullmatch(name) is None:
        raise ValueError("a picture is a .png file of the stage's own folder, like pictures/NAME.png")
    return name


PictureName = Annotated[str, AfterValidator(_plain)]
BoundedNumber = Annotated[float, Field(gt=-1e100, lt=1e100)]
"""A finite number, small enough for charts."""


class Row(FrozenModel):
    """The measurements of a network with one solver at one number of steps."""

    network: Line
    """"teacher", or the name of a student"""
    role: Literal["teacher", "student"]
    solver: Line
    steps: Positive
    """of dopri5: the number of steps that it tries for a sample, on average, rounded up"""
    fine: bool = False
    """whether it was sampled with the fine solver; `rms` of every row compares with the teacher's samples with it"""
    along: Line = ""
    """step times. empty: uniform, or the student's own; optimal; or a list of times"""
    guidance_scale: BoundedNumber | None = None
    """of the teacher in this row; null: that of the evaluation"""
    nfe: Positive
    """network evaluations per sample, guidance counted; if they differ between samples, their mean, rounded up"""
    most_calls: Positive | None = None
    """network evaluations of the sample with the most, if they differ between samples"""
    distance: BoundedNumber | None
    """the distance that `Results.distance` names; null: no reference"""
    kid: BoundedNumber | None
    """KID of the features divided by the root mean square of the real features"""
    precision: BoundedNumber | None
    recall: BoundedNumber | None
    metrics: dict[Line, BoundedNumber] = {}
    """what the metrics of the user found, by column"""
    groups: dict[Line, dict[Line, BoundedNumber]] = {}
    """the scores for groups of prompts: group -> metric -> number"""
    rms: BoundedNumber
    """root mean square difference to the teacher's fine endpoint from the same noise"""
    images_per_second: Annotated[float, Field(gt=0, lt=1e100)]
    """speed of generating the samples, without measuring them"""
    straightness: BoundedNumber | None
    """straightness of the network's own paths, 0: straight; the same in all rows of a network; null: not defined"""
    transport: BoundedNumber | None = None
    """mean over samples and elements of (sample - its noise)^2; null: results of an earlier version"""
    picture: PictureName
    """file of the first samples, in the folder of the results or in pictures/"""

    @property
    def value(self) -> float:
        """The distance; if there is no reference data, the RMS difference to the teacher."""
        return self.rms if self.distance is None else self.distance

    @property
    def way(self) -> str:
        """Text that follows the name of the network: its step times and guidance scale, if they are not the default."""
        times = f", {self.along} times" if self.along == "optimal" else f", along {self.along}" if self.along else ""
        return times if self.guidance_scale is None else f"{times}, guidance {self.guidance_scale:g}"

    @property
    def is_usual(self) -> bool:
        """Whether its step times and its guidance scale are the default."""
        return not self.along and self.guidance_scale is None

    @property
    def label(self) -> str:
        """Text that identifies the row, without its number of steps, like: teacher, heun."""
        return (f"{self.network}, {self.solver}" if self.role == "teacher" or self.fine else self.network) + self.way


class FeatureNet(FrozenModel):
    """The network whose features the Frechet distance compares."""

    task: Line
    accuracy: BoundedNumber
    dim: Positive


class Results(FrozenModel):
    """The content of results.json."""

    format: Literal[1] = 1
    stage: Line
    samples: Positive
    """per row"""
    seed: NonNegativeInt
    block: Positive
    device: Line
    guidance_scale: BoundedNumber
    guidance: Line = ""
    """guidance and epsilon scaling of the teacher in words, if there is more than guidance_scale"""
    distance: Line | None
    """FD-<data>, SW2, histogram KL, or null if there is nothing to compare with"""
    features: FeatureNet | None
    reference: NonNegativeInt
    """number of real or exact samples to compare with"""
    floor: BoundedNumber | None = None
    """mean distance between the reference samples and other sets of exact samples"""
    vector: bool
    latents: bool = False
    """whether samples are latents, which `rms` and `transport` compare; pixels are decoded for the rest"""
    real: dict[Line, BoundedNumber] = {}
    """the scores of real images by the metrics of the user"""
    captions: Annotated[list[Line], Field(max_length=1000)] = []
    """the prompts of the first pictures, which samples use in turn; empty: there are none, or they are not known"""
    picture_columns: Annotated[int, Field(ge=1, le=100)] | None = None
    """of pictures, which show the first samples in the order of their prompts; null: there are no prompts"""
    real_picture: PictureName | None = None
    """file of real images of these prompts; null: there are none"""
    rows: list[Row] = Field(min_length=1, max_length=10_000)

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Self:
        if not any(row.fine for row in self.rows):
            raise ValueError("the teacher's row with its fine solver is missing")
        return self

    @property
    def usual(self) -> list[Row]:
        """The rows with default step times and guidance scale."""
        return [row for row in self.rows if row.is_usual]

    def baseline(self, row: Row) -> Row | None:
        """The best row of the teacher with at most as many network calls as `row`; None if there is none.

        The fine solver does not count, since its samples are the reference, nor do rows with another guidance scale.
        """
        teachers = [each for each in self.rows if each.role == "teacher" and not each.fine]
        rows = [each for each in teachers if each.guidance_scale is None and each.nfe <= row.nfe]
        return min(rows, key=lambda each: each.value, default=None)

    @property
    def unbeaten(self) -> list[tuple[Row, Row]]:
        """(row of a student, its baseline) where the student is not better than the baseline."""
        students = [row for row in self.rows if row.role == "student" and not row.fine]
        pairs = [(row, base) for row in students if (base := self.baseline(row)) is not None]
        return [(row, base) for row, base in pairs if not row.value < base.value]

    def row(
        self,
        network: str,
        steps: int,
        *,
        fine: bool = False,
        along: str = "",
        guidance_scale: float | None = None,
    ) -> Row:
        """The row of a network at a number of steps. InputError if there is none."""
        for row in self.rows:
            found = (row.network, row.steps, row.fine, row.along, row.guidance_scale)
            if found == (network, steps, fine, along, guidance_scale):
                return row
        raise InputError(
            f"no row for {network} at {steps} steps; there are {[(r.network, r.steps) for r in self.rows]}"
        )


def card_metrics(results: Results, student: str) -> dict[str, float]:
    """The metrics of a student's model card: NAME@STEPS -> value, from the rows of its own sampler.

    Only numbers that are reproducible from the spec are included. They are rounded to six digits, since further digits
    may depend on the memory alignment of sums.
    """
    found: dict[str, float] = {}
    for row in results.usual:
        if row.role == "student" and row.network == student and not row.fine:
            columns = {results.distance or "": row.distance, "KID": row.kid, "precision": row.precision,
                       "recall": row.recall, **row.metrics, "rms": row.rms,
                       "straightness": row.straightness}  # fmt: skip
            base = results.baseline(row)
            if base is not None:
                columns[f"{BASELINE} {results.distance or 'rms'}"] = base.value
            found |= {f"{name}@{row.steps}": float(f"{x:.6g}") for name, x in columns.items() if x is not None}
    return found


RESULTS: records.Schema[Results] = records.Schema(Results)


def load_results(stage: StagePaths) -> Results | None:
    """The results of an evaluate stage; None if there are none yet. InputError if they are damaged."""
    try:
        return records.load(
            stage.root / FILE_NAME, RESULTS, f"delete that file and {stage.done.name} to evaluate again"
        )
    except FileNotFoundError:
        return None


def of_run(run: RunPaths) -> dict[str, Results]:
    """Stage -> results, sorted by stage name, for the stages that have results. InputError if any are damaged."""
    names = sorted(path.parent.name for path in run.root.glob(f"stages/*/{FILE_NAME}"))
    names = [name for name in names if NAME.fullmatch(name)]  # other folders are not stages
    found = {name: load_results(run.stage(name)) for name in names}
    return {name: results for name, results in found.items() if results is not None}


def picture(folder: Path, name: str, room: int = PICTURE_BYTES) -> bytes | None:
    """The PNG file of a picture; None if it no longer exists, b"" if it has more than `room` bytes.

    Raises InputError if it is not a PNG file or is outside of `folder`. folder: the folder of the results.
    """
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path} cannot be used: it links out of its folder; delete it, and evaluate again")
        if path.stat().st_size > room:
            return b""
        content = records.read_small(path, PICTURE_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not is_png(content):
        raise InputError(f"{path} cannot be used: it is not a PNG picture; delete it, and evaluate again")
    return content


def number(value: float) -> str:
    """A number as text: four decimals below 1, two below 1000, none above; tiny values in scientific notation."""
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def columns(results: Results) -> list[str]:
    """Column titles for `cells`, in the same order."""
    distance = [results.distance, "KID x 1000", "precision", "recall"] if results.distance else []
    baseline = [BASELINE] if _has_baselines(results) else []
    return [
        "NFE",
        *distance,
        *_own(results),
        "RMS to teacher",
        *baseline,
        "samples/s" if results.vector else "images/s",
    ]


def cells(results: Results, row: Row) -> list[str]:
    """The numbers of a row as text."""
    measured = []
    if row.distance is not None and row.kid is not None and row.precision is not None and row.recall is not None:
        measured = [value(results, row), f"{1000 * row.kid:.2f}", f"{row.precision:.3f}", f"{row.recall:.3f}"]
    baseline = []
    if _has_baselines(results):
        base = results.baseline(row) if row.role == "student" and not row.fine else None
        baseline = ["-" if base is None else f"{value(results, base)} {base.solver}"]
    nfe = f"{row.nfe}" if row.most_calls is None else f"{row.nfe} (at most {row.most_calls})"
    own = [number(row.metrics[name]) if name in row.metrics else "-" for name in _own(results)]
    return [nfe, *measured, *own, f"{row.rms:.4f}", *baseline, f"{row.images_per_second:,.0f}"]


def _own(results: Results) -> list[str]:
    """The columns of the user's metrics."""
    return list(dict.fromkeys(name for row in results.rows for name in row.metrics))


def value(results: Results, row: Row) -> str:
    """The number of a row that baselines are compared by, as text: its distance, or the RMS difference."""
    return f"{row.value:.4f}" if results.vector or results.distance is None else number(row.value)


def _has_baselines(results: Results) -> bool:
    return any(results.baseline(row) for row in results.rows if row.role == "student" and not row.fine)


def verdicts(results: Results, student: str | None = None) -> str:
    """A sentence, which begins with a space, for each row of students that is not better than its baseline.

    student: only of this one; None: of all.
    """
    return "".join(
        f" With {calls(row.nfe)}, {row.label} reaches {value(results, row)}, and the teacher {value(results, base)} "
        f"with {base.solver} and {calls(base.nfe)}: {row.label} does not beat it."
        for row, base in results.unbeaten
        if student in (None, row.network)
    )


def calls(nfe: int) -> str:
    """A number of network calls in words."""
    return "one network call" if nfe == 1 else f"{nfe} network calls"


def describe(results: Results) -> str:
    """A short description of the numbers: samples per row, the distance with its reference, and what baselines are."""
    said = [f"{results.samples:,} samples per row"]
    net = results.features
    if net is not None:
        said.append(
            f"{results.distance}: Frechet distance to {results.reference:,} real images, {net.dim} features of a "
            f"classifier trained on their {net.task} (accuracy {net.accuracy:.1%} on held-out images)"
        )
    elif results.distance is not None:
        what = "KL divergence from the histogram of" if results.distance == HISTOGRAM else "sliced Wasserstein-2 to"
        said.append(f"{results.distance}: {what} {results.reference:,} exact samples")
        if results.floor is not None:
            said[-1] += f"; other sets of exact samples have a distance of {number(results.floor)} on average"
    if results.real:
        said.append("Real images: " + ", ".join(f"{name} {number(score)}" for name, score in results.real.items()))
    if results.latents:
        said.append("RMS to teacher: of the latents")
    if _has_baselines(results):
        said.append("Best baseline: the teacher's best value with at most as many network calls, and its solver")
    return ". ".join(said) + "."


def table(results: Results) -> Table:
    """The results as a table for a terminal."""
    shown = Table(
        title=f"evaluation '{results.stage}'", caption=describe(results) + verdicts(results), title_justify="left"
    )
    names = columns(results)
    kept = [place for place, name in enumerate(names) if not name.startswith(BESIDE_FD)]
    if len(kept) < len(names):
        shown.caption = f"{shown.caption} KID, precision and recall of your metrics are in the report."
    shown.add_column("network")
    shown.add_column("steps", justify="right")
    for place in kept:
        shown.add_column(names[place], justify="right")
    previous = results.rows[0].network
    for row in results.rows:
        if row.network != previous:
            shown.add_section()
        previous = row.network
        style = "bold" if row.role == "student" else None
        found = cells(results, row)
        shown.add_row(row.label, str(row.steps), *(found[place] for place in kept), style=style)
    return shown
