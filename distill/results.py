"""What an evaluation found, as data and as a table. No torch here."""

from typing import Literal

from pydantic import Field
from rich.table import Table

from distill.guard import InputError
from distill.spec import Frozen
from distill.store import RunPaths, StagePaths

FILE_NAME = "results.json"


class Row(Frozen):
    """One way to make samples, measured."""

    network: str
    """"teacher", or the name of a student"""
    role: Literal["teacher", "student"]
    solver: str
    steps: int
    fine: bool = False
    """the solver whose endpoint counts as the teacher's own; of a student: by that solver, not by its own sampler"""
    along: str = ""
    """the times of the steps: empty: uniform, or the student's own; optimal; or the times"""
    nfe: int
    """network evaluations per sample, guidance counted"""
    distance: float | None
    """the distance that `Results.distance` names; null: no reference"""
    kid: float | None
    """of features in units of the real ones' root mean square"""
    precision: float | None
    recall: float | None
    rms: float
    """root mean square difference to the teacher's fine endpoint from the same noise"""
    images_per_second: float
    """generation alone"""
    straightness: float | None
    """of the network's own paths, 0 = straight; the same in all rows of a network; null: a flow map and the like"""
    transport: float | None = None
    """mean over samples and elements of (sample - its noise)^2; null: measured before this was"""
    picture: str
    """file of the first samples, beside the results"""

    @property
    def value(self) -> float:
        """The distance, or the RMS where there is nothing to compare with."""
        return self.rms if self.distance is None else self.distance

    @property
    def way(self) -> str:
        """For people, after a name: what is unusual of its steps."""
        return f", {self.along} times" if self.along == "optimal" else f", along {self.along}" if self.along else ""

    @property
    def label(self) -> str:
        """For people: teacher, heun 16."""
        return (f"{self.network}, {self.solver}" if self.role == "teacher" or self.fine else self.network) + self.way


class FeatureNet(Frozen):
    """The network whose features the Frechet distance compares."""

    task: str
    accuracy: float
    dim: int


class Results(Frozen):
    """The content of results.json."""

    format: Literal[1] = 1
    stage: str
    samples: int
    """per row"""
    seed: int
    block: int
    device: str
    guidance_scale: float
    distance: str | None
    """FD-<data>, SW2, or null where there is nothing to compare with"""
    features: FeatureNet | None
    reference: int
    """samples of the real data, or exact samples, compared with"""
    floor: float | None = None
    """distance of two sets of exact samples"""
    vector: bool
    rows: list[Row] = Field(min_length=1)

    @property
    def usual(self) -> list[Row]:
        """Without those along other times."""
        return [row for row in self.rows if not row.along]

    def row(self, network: str, steps: int, *, fine: bool = False, along: str = "") -> Row:
        """The row of a network at a number of steps."""
        for row in self.rows:
            if (row.network, row.steps, row.fine, row.along) == (network, steps, fine, along):
                return row
        raise InputError(
            f"no row for {network} at {steps} steps; there are {[(r.network, r.steps) for r in self.rows]}"
        )


def card_metrics(results: Results, student: str) -> dict[str, float]:
    """What a student's model card says: its numbers that the same spec gives again, as NAME@STEPS, to six digits.

    Of its own sampler: others are not what it is for. Further digits may depend on where in memory a sum began.
    """
    found: dict[str, float] = {}
    for row in results.usual:
        if row.role == "student" and row.network == student and not row.fine:
            columns = {results.distance or "": row.distance, "KID": row.kid, "precision": row.precision,
                       "recall": row.recall, "rms": row.rms, "straightness": row.straightness}  # fmt: skip
            found |= {f"{name}@{row.steps}": float(f"{x:.6g}") for name, x in columns.items() if x is not None}
    return found


def load(stage: StagePaths) -> Results | None:
    """The results of an evaluate stage, once it has any."""
    path = stage.root / FILE_NAME
    return Results.model_validate_json(path.read_bytes()) if path.exists() else None


def of_run(run: RunPaths) -> dict[str, Results]:
    """Results by stage, of the stages that have any, in the order of their names."""
    found = {
        path.parent.name: load(run.stage(path.parent.name)) for path in sorted(run.root.glob(f"stages/*/{FILE_NAME}"))
    }
    return {name: results for name, results in found.items() if results is not None}


def number(value: float) -> str:
    """Four digits at most, so that columns can be compared by eye."""
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def columns(results: Results) -> list[str]:
    """Heads of the numbers of a row, in the order of `cells`."""
    distance = [results.distance, "KID x 1000", "precision", "recall"] if results.distance else []
    return ["NFE", *distance, "RMS to teacher", "samples/s" if results.vector else "images/s"]


def cells(results: Results, row: Row) -> list[str]:
    """The numbers of a row, as text that lines up below each other."""
    measured = []
    if row.distance is not None and row.kid is not None and row.precision is not None and row.recall is not None:
        distance = f"{row.distance:.4f}" if results.vector else number(row.distance)
        measured = [distance, f"{1000 * row.kid:.2f}", f"{row.precision:.3f}", f"{row.recall:.3f}"]
    return [str(row.nfe), *measured, f"{row.rms:.4f}", f"{row.images_per_second:,.0f}"]


def describe(results: Results) -> str:
    """What the numbers are of, in one sentence or two."""
    said = [f"{results.samples:,} samples a row"]
    net = results.features
    if net is not None:
        said.append(
            f"{results.distance}: Frechet distance to {results.reference:,} real images, {net.dim} features of a "
            f"classifier of their {net.task} ({net.accuracy:.1%} right on held-out images)"
        )
    elif results.distance is not None:
        floor = f"; {number(results.floor)} between two exact sets" if results.floor is not None else ""
        said.append(f"{results.distance}: sliced Wasserstein-2 to {results.reference:,} exact samples{floor}")
    return ". ".join(said) + "."


def table(results: Results) -> Table:
    """The results as a table for a terminal."""
    shown = Table(title=f"evaluation '{results.stage}'", caption=describe(results), title_justify="left")
    shown.add_column("network")
    shown.add_column("steps", justify="right")
    for name in columns(results):
        shown.add_column(name, justify="right")
    previous = results.rows[0].network
    for row in results.rows:
        if row.network != previous:
            shown.add_section()
        previous = row.network
        style = "bold" if row.role == "student" else None
        shown.add_row(row.label, str(row.steps), *cells(results, row), style=style)
    return shown
