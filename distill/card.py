"""What a student folder says of itself: distill.json for programs, README.md for people. No torch here."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import jinja2
from pydantic import Field, NonNegativeInt, ValidationError, model_validator

from distill.guard import InputError, whole_number
from distill.nfe import network_calls
from distill.spec import Frozen, is_path
from distill.store import write_atomic

FILE_NAME, README = "distill.json", "README.md"
# What a student of each kind can be sampled by.
SAMPLERS = {"velocity": ("euler", "same_noise"), "flow_map": ("jump", "renoise"), "acceleration": ("accelerated",)}

# Kinds that are no velocity field, in words.
NO_FIELDS = {"flow_map": "a flow map", "acceleration": "a velocity with its acceleration"}


class FileRecord(Frozen):
    """One file of the folder."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: NonNegativeInt


class StudentCard(Frozen):
    """The content of distill.json. Depends on nothing but the student: no dates, no places."""

    format: Literal[1] = 1
    name: str
    recipe: str
    """name of the recipe, like reflow/reflow"""
    summary: str = ""
    """first sentence of the recipe: the method and its paper"""
    spec_digest: str
    teacher_digest: str | None
    """null: trained on data alone"""
    teacher: str = ""
    """one line for people"""
    data: str = ""
    """name of the data set; empty: none"""
    license: str = ""
    """terms of the weights, if known"""
    kind: Literal["velocity", "flow_map", "acceleration"] = "velocity"
    """v(x_t, t), u(x_t, t, s), or v(noise, 1) with a(x_t, t, v)"""
    prediction: Literal["velocity"] = "velocity"
    """of a flow map: its average from t to s; of kind acceleration: that at t = 1"""
    interpolant: Literal["linear"] = "linear"
    sampler: Literal["euler", "same_noise", "jump", "renoise", "accelerated"] = "euler"
    """a name in samplers/"""
    t_grids: dict[int, list[float]] = {}
    """number of steps N: its N + 1 times from 1 to 0, and it has no other N; empty: 1, (N-1)/N, ..., 0 for any N"""
    num_classes: int | None
    null_class: int | None
    """class id of the unconditional call"""
    unconditional: bool = True
    """whether it has learnt the unconditional velocity; one trained on guided or labelled pairs alone has not"""
    shape: tuple[int, ...]
    """of one sample"""
    guidance_scale: float = 1.0
    """classifier-free guidance that is baked in; 1 = none"""
    weights: Literal["raw"] | float
    """raw, or the half-life of the average in images"""
    images: int
    """samples shown to the optimizer"""
    metrics: dict[str, float] = {}
    """what an evaluation of its run measured, NAME@STEPS like FD-digits@1"""
    files: dict[str, FileRecord] = Field(default_factory=dict)
    """every other file of the folder; filled in by the export"""

    @model_validator(mode="before")
    @classmethod
    def _of_before(cls, content: Any) -> Any:  # noqa: ANN401  (whatever a file holds)
        """Cards said t_grid: uniform, before there were others."""
        if isinstance(content, dict) and content.get("t_grid") == "uniform":
            return {name: value for name, value in content.items() if name != "t_grid"}
        return content

    @model_validator(mode="after")
    def _can_be_sampled(self) -> Self:
        if self.sampler not in SAMPLERS[self.kind]:
            valid = ", ".join(SAMPLERS[self.kind])
            raise ValueError(f"sampler {self.sampler} does not fit a student of kind {self.kind}; valid: {valid}")
        for steps, times in self.t_grids.items():
            if len(times) != steps + 1 or not is_path(times):
                raise ValueError(
                    f"t_grids: {steps} steps go along {steps + 1} times from 1 down to 0, not along {times}"
                )
        return self

    @property
    def fewest_steps(self) -> int:
        """The smallest number of steps that it is made for."""
        return min(self.t_grids, default=1)


def record(folder: Path) -> dict[str, FileRecord]:
    """sha256 and size of every file of a student folder but distill.json, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE_NAME)
    records = {}
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        records[path.relative_to(folder).as_posix()] = FileRecord(sha256=digest, size=path.stat().st_size)
    return records


def read(folder: Path) -> StudentCard:
    """The card of a student folder."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise InputError(
            f"{folder} is not a student folder: it has no {FILE_NAME}; give a folder that `distill export` "
            "or a train stage has written"
        )
    return parse(path.read_bytes(), str(path))


def parse(content: bytes, where: str) -> StudentCard:
    """The card that a distill.json holds."""
    try:
        return StudentCard.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "its JSON"
        raise InputError(f"{where} cannot be used: {field}: {first['msg']}; export the student again") from error


def verify(folder: Path) -> StudentCard:
    """The card, once every file it names is there, whole and unchanged, and no other file is."""
    card = read(folder)
    found = record(folder)
    for name, expected in card.files.items():
        if name not in found:
            raise InputError(f"{folder}: {name} is missing; copy or export the student again")
        if found[name] != expected:
            raise InputError(
                f"{folder}: {name} is damaged: {found[name].size} bytes with sha256 {found[name].sha256[:12]}, "
                f"expected {expected.size} with {expected.sha256[:12]}; copy or export the student again"
            )
    strange = sorted(found.keys() - card.files.keys())
    if strange:
        raise InputError(
            f"{folder}: {', '.join(strange)} is not listed in {FILE_NAME}; remove what does not belong there"
        )
    return card


def add_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Say in distill.json and README.md what was measured. What a kill between the two leaves, the next call mends."""
    for left in folder.glob(".*.tmp-*"):  # of a process that was killed
        left.unlink()
    old = read(folder)
    card = old.model_copy(update={"metrics": {**old.metrics, **metrics}})
    text = readme(card).encode()
    files = {**old.files, README: FileRecord(sha256=hashlib.sha256(text).hexdigest(), size=len(text))}
    write_atomic(folder / README, text)
    write_atomic(folder / FILE_NAME, to_json(card.model_copy(update={"files": files})))


def to_json(card: StudentCard) -> str:
    """The bytes of distill.json."""
    return json.dumps(card.model_dump(mode="json"), indent=2) + "\n"


@dataclass(frozen=True)
class Cost:
    """What a stage took on the way to a student."""

    stage: str
    work: str
    time: str
    place: str


@dataclass(frozen=True)
class Publication:
    """What the model card of a published student says beyond the student: its run knows it."""

    name: str
    picture: str = ""
    """file of samples in the folder; empty: none"""
    measured: str = ""
    """what the table below is of"""
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """A card's metrics as a table by NFE."""

    names: list[str]
    rows: list[tuple[int, list[str]]]


def _measured(card: StudentCard) -> Measured | None:
    found: dict[int, dict[str, str]] = {}
    for key, value in card.metrics.items():
        name, _, steps = key.partition("@")
        found.setdefault(whole_number(steps) or 0, {})[name] = f"{value:.4g}"
    names = list(dict.fromkeys(key.partition("@")[0] for key in card.metrics))
    rows = [
        (network_calls(card.sampler, steps), [values.get(name, "") for name in names])
        for steps, values in sorted(found.items())
    ]
    return Measured(names, rows) if rows else None


def readme(card: StudentCard, published: Publication | None = None) -> str:
    """The model card."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distill"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    facts: dict[str, Any] = card.model_dump()
    return environment.get_template("model_card.md.j2").render(
        card=facts, steps=card.fewest_steps, vector=len(card.shape) == 1, measured=_measured(card), published=published
    )
