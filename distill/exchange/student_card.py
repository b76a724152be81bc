"""The description of a student in its folder: distill.json and the model card README.md. Does not import torch."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jinja2
import yaml
from pydantic import Field, StrictBool, ValidationError, model_validator

from distill.core import markdown, records
from distill.core.atomic import remove_unfinished, write_atomic
from distill.core.errors import InputError
from distill.core.field_types import LINE, CheckedRange, Count, FrozenModel, Label, Line, Number
from distill.core.regular_files import open_regular, read_regular
from distill.core.text import one_line
from distill.exchange import lora_use, measured, step_numbers
from distill.spec.kinds import SAMPLERS, STUDENTS, SamplerName, StudentName, network_calls
from distill.spec.model import is_path

FILE_NAME, README = "distill.json", "README.md"
# fields that cards of earlier versions do not have
ADDED = {"fitted", "guidance", "lora", "base_digest", "trained_steps", "table_times", "stock"}
ADDED |= {"guidance_range", "is_distilled", "nfe", "pipeline", "size", "dtype", "embedded_guidance"}
MAX_CARD = 1 << 20  # bytes of a distill.json
MAX_FILES = 1000
LARGEST = 2**63 - 1  # total bytes of all files
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Length = Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)]
StepsKey = Annotated[int, Field(ge=1, le=2**31 - 1)]  # not strict, since it is a key, which is text in JSON
Metrics = Annotated[dict[Label, Number], Field(max_length=1000)]


class FileRecord(FrozenModel):
    """Checksum and size of a file of the folder."""

    sha256: Digest
    size: Count
    """in bytes"""


class LoraFacts(FrozenModel):
    """How a network was trained as adapters of the teacher's."""

    rank: Length
    alpha: Number
    targets: Annotated[list[Line], Field(max_length=1000)]
    """the ends of the names of the layers with adapters; empty: the linear layers of the attention"""


def refuse_rows(rows: list[list[float]], steps: int) -> None:
    """Raise ValueError unless these are the weights of a fitted solver with so many steps."""
    if [len(row) for row in rows] != [i + 2 for i in range(steps)]:
        raise ValueError(f"a fitted solver of {steps} steps has {steps} rows, of 2 to {steps + 1} weights")
    if not all(math.isfinite(weight) for row in rows for weight in row):
        raise ValueError("the weights of a fitted solver must be finite")


class StockCall(FrozenModel):
    """How the pipeline of its teacher's class in diffusers samples a student, with the scheduler of its folder."""

    steps: Annotated[list[Length], Field(min_length=1, max_length=100)] | None = None
    """numbers of steps for which it makes the samples that distill makes; null: any"""
    arguments: Annotated[dict[Label, Number], Field(max_length=10)] = {}
    """of its call, in addition to num_inference_steps"""
    reason: Line = ""
    """why it cannot sample the student; empty: it can"""


class StudentCard(FrozenModel):
    """The content of distill.json. It depends on the student alone, so it has no dates and no paths.

    It may be untrusted, so each value is restricted: text is one line without control characters, numbers are finite.
    """

    format: Literal[1] = 1
    name: Label
    recipe: Line
    """name of the recipe, like reflow/reflow"""
    summary: Line = ""
    """first sentence of the recipe: the method and its paper"""
    spec_digest: Annotated[str, Field(pattern="^[0-9a-f]{0,64}$")]
    teacher_digest: Annotated[str, Field(pattern="^[0-9a-f]{0,64}$")] | None
    """null: trained on data only"""
    base_digest: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """of a LoRA student: SHA-256 over the config and the weights of the network that it belongs to; empty: all weights
    are in the folder"""
    teacher: Line = ""
    """description of the teacher, in one line"""
    data: Line = ""
    """name of the data set; empty: none"""
    license: Line = ""
    """terms of the weights, if known"""
    kind: StudentName = "velocity"
    """velocity: v(x_t, t); flow_map: u(x_t, t, s); acceleration: v(noise, 1) and a(x_t, t, v)"""
    prediction: Literal["velocity"] = "velocity"
    """flow_map: the average velocity from t to s; acceleration: the velocity at t = 1"""
    interpolant: Literal["linear"] = "linear"
    sampler: SamplerName = "euler"
    """a name in samplers/"""
    t_grids: Annotated[dict[StepsKey, Annotated[list[Number], Field(fail_fast=True)]], Field(max_length=1000)] = {}
    """number of steps N -> its N + 1 times from 1 to 0; no other N is possible; empty: 1, (N-1)/N, ..., 0 for any N"""
    table_times: StrictBool = False
    """whether step i of N begins at n = T - 1 - floor(i T / N) of the T steps of its scheduler, if t_grids is empty"""
    trained_steps: step_numbers.TrainedSteps | None = None
    """number of steps that it was trained for, or several, if its recipe trains for certain ones; others are possible,
    unless t_grids has no times for them"""
    fitted: Annotated[dict[StepsKey, Annotated[list[list[Number]], Field(max_length=64)]], Field(max_length=64)] = {}
    """of a fitted sampler: number of steps N -> its N rows of weights; row i: a_i, b_i0, ..., b_ii"""
    network: Annotated[str, Field(pattern="^[A-Za-z0-9_]{0,100}$")] = ""
    """network class of its teacher's pipeline in diffusers, if it has that class; empty: the folder has a pipeline"""
    component: Literal["", "transformer", "unet"] = ""
    """folder of that network"""
    stock: StockCall | None = None
    """null: the folder has a pipeline of its own"""
    pipeline: Annotated[str, Field(pattern="^[A-Za-z0-9_]{0,100}$")] = ""
    """class of the complete pipeline in the folder; empty: it has no text encoders and no autoencoder"""
    size: Annotated[list[Length], Field(max_length=3)] = []
    """[height, width] in pixels, or [frames, height, width], of what that pipeline makes"""
    dtype: Literal["", "bfloat16"] = ""
    """data type of the network's weights; empty: float32"""
    is_distilled: StrictBool = False
    """true, except in cards of earlier versions: it is sampled in few steps, and without classifier-free guidance"""
    nfe: Annotated[list[Length], Field(max_length=1000)] = []
    """numbers of network calls per sample that it is made for"""
    num_classes: Length | None
    null_class: Count | None
    """class id of the unconditional call"""
    unconditional: StrictBool = True
    """whether it has learnt the unconditional velocity; one trained only on guided or labelled pairs has not"""
    shape: Annotated[tuple[Length, ...], Field(min_length=1, max_length=8)]
    """of one sample"""
    guidance_scale: Number = 1.0
    """classifier-free guidance scale that the student has learnt; 1 = none; of guidance_range, the middle"""
    guidance_range: CheckedRange | None = None
    """guidance scales [low, high] that its network takes as an input; null: it takes none"""
    guidance: Line = ""
    """how its pairs were guided, in words, if there was more to it than guidance_scale"""
    embedded_guidance: Annotated[Number, Field(ge=0, le=10_000)] | None = None
    """guidance scale that its network gets as an input, as in training; null: it takes none, its conditions have one in
    each row, or an earlier version wrote the card"""
    weights: Literal["raw"] | Number
    """raw, or the half-life of the EMA weights in images, or, below 1, their length relative to the training"""
    images: Count
    """samples shown to the optimizer"""
    metrics: Metrics = {}
    """what an evaluation of its run measured, NAME@STEPS like FD-digits@1"""
    lora: Annotated[dict[Label, LoraFacts], Field(max_length=16)] = {}
    """networks that were trained as adapters, by their name in the recipe; with `student`, the folder has no base"""
    files: dict[str, FileRecord] = Field(default_factory=dict, max_length=MAX_FILES)
    """every other file of the folder; filled in by the export"""

    @model_validator(mode="before")
    @classmethod
    def _of_before(cls, content: Any) -> Any:  # noqa: ANN401  (whatever a file holds)
        """Remove `t_grid: uniform`, which earlier versions wrote."""
        if isinstance(content, dict) and content.get("t_grid") == "uniform":
            return {name: value for name, value in content.items() if name != "t_grid"}
        return content

    @model_validator(mode="after")
    def _can_be_sampled(self) -> Self:
        if self.sampler not in STUDENTS[self.kind].samplers:
            valid = ", ".join(STUDENTS[self.kind].samplers)
            raise ValueError(f"sampler {self.sampler} does not fit a student of kind {self.kind}; valid: {valid}")
        for steps, times in self.t_grids.items():
            if len(times) != steps + 1 or not is_path(times):
                raise ValueError(
                    f"t_grids: {steps} steps need {steps + 1} times that decrease from 1 to 0, got {times}"
                )
        step_numbers.refuse_trained(self.trained_for, self.t_grids)
        if SAMPLERS[self.sampler].is_fitted != bool(self.fitted) or (self.fitted and {*self.fitted} != {*self.t_grids}):
            raise ValueError("fitted: the sampler bns needs weights for each number of steps in t_grids, others none")
        for steps, rows in self.fitted.items():
            refuse_rows(rows, steps)
        return self

    @property
    def is_native(self) -> bool:
        """Whether it has the network class of its teacher's pipeline in diffusers."""
        return bool(self.network)

    @property
    def trained_for(self) -> list[int]:
        """The numbers of steps that the student was trained for; empty if its training aims at none in particular."""
        return step_numbers.listed(self.trained_steps)

    @property
    def made_for(self) -> list[int]:
        """The numbers of steps that the student is made for; of any number that its pipeline supports: 1, 2 and 4."""
        if self.t_grids or self.trained_for:
            return self.trained_for or sorted(self.t_grids)
        supported = None if self.stock is None or self.stock.reason else self.stock.steps
        few = [steps for steps in step_numbers.FEW if supported is None or steps in supported]
        return few or list(supported or [])[:1]

    @property
    def fewest_steps(self) -> int:
        """The smallest number of steps that the student is made for."""
        return min(self.made_for)


def record(folder: Path) -> dict[str, FileRecord]:
    """Relative path -> sha256 and size, for all files of a student folder except distill.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE_NAME)
    records = {}
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        records[path.relative_to(folder).as_posix()] = FileRecord(sha256=digest, size=path.stat().st_size)
    return records


def write(folder: Path, card: StudentCard) -> None:
    """Write README.md and distill.json, with the checksums of all files that are in the folder."""
    calls = [network_calls(card.sampler, steps) for steps in card.made_for]
    (folder / README).touch()  # so that it has its place in the list of files
    card = card.model_copy(update={"is_distilled": True, "nfe": calls, "files": record(folder)})
    text = readme(card).encode()
    (folder / README).write_bytes(text)
    (folder / FILE_NAME).write_text(to_json(_with_readme(card, text)))


def read(folder: Path) -> StudentCard:
    """The card of a student folder that the user has given. InputError if it is missing or invalid.

    distill.json may be a link, as in the hub's cache.
    """
    path = folder / FILE_NAME
    try:
        content = read_regular(path, MAX_CARD, follow=True)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder} is not a student folder: it has no {FILE_NAME}; give a folder that `distill export` "
            "or a train stage has written"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return parse(content, str(path))
    except InputError as error:
        raise InputError(f"{error}; export or copy the student again") from error


def is_lora(folder: Path) -> bool:
    """Whether a folder holds a LoRA student, which has no weights of its own."""
    return (folder / FILE_NAME).is_file() and "student" in read(folder).lora


def parse(content: bytes, where: str) -> StudentCard:
    """The card from the content of a distill.json. InputError if it is invalid. where: its name in the message."""
    if len(content) > MAX_CARD:
        raise InputError(f"{where} has {len(content):,} bytes; valid: at most {MAX_CARD:,}")
    try:
        card = StudentCard.model_validate_json(content)
    except ValidationError as error:
        raise InputError(f"{where} cannot be used: {records.mistake(error)}") from error
    if "/" in card.name or "\\" in card.name:
        raise InputError(
            f"{where} cannot be used: name: {json.dumps(card.name)} given; valid: without / and \\, because files are "
            "named after the student"
        )
    return card


def verify(folder: Path) -> StudentCard:
    """Check the files of a student folder, and return its card.

    Raises InputError if a listed file is missing or changed, or if there are other files. A file of the wrong size is
    not read.
    """
    card = read(folder)
    for name, expected in card.files.items():
        try:
            with open_regular(folder / name) as file:
                size = os.fstat(file.fileno()).st_size
                digest = hashlib.file_digest(file, "sha256").hexdigest() if size == expected.size else None
        except FileNotFoundError:
            raise InputError(f"{folder}: {name} is missing; copy or export the student again") from None
        except OSError as error:
            raise InputError(f"{folder}: {name} cannot be read: {error.strerror}") from error
        if digest != expected.sha256:
            found = f"{size} bytes" if digest is None else f"{size} bytes with sha256 {digest[:12]}"
            raise InputError(
                f"{folder}: {name} is damaged: {found}, expected {expected.size} bytes with sha256 "
                f"{expected.sha256[:12]}; copy or export the student again"
            )
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    refuse_strange(there, card, str(folder))
    return card


def refuse_strange(found: Collection[str], card: StudentCard, where: str) -> None:
    """Raise InputError if a folder contains files that its distill.json does not list."""
    if strange := sorted(set(found) - card.files.keys() - {FILE_NAME}):
        raise InputError(
            f"{where}: files that {FILE_NAME} does not list: {one_line(', '.join(strange), 200)}; remove them"
        )


def add_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Write metrics to distill.json and README.md. If the process is killed in between, call it again.

    Values that are not finite are left out, since a card may not have them.
    """
    remove_unfinished(folder)
    old, finite = read(folder), {name: value for name, value in metrics.items() if math.isfinite(value)}
    card = old.model_copy(update={"metrics": {**old.metrics, **finite}})
    text = readme(card).encode()
    write_atomic(folder / README, text)
    write_atomic(folder / FILE_NAME, to_json(_with_readme(card, text)))


def _with_readme(card: StudentCard, text: bytes) -> StudentCard:
    """The card with the checksum of README.md, whose content is `text`."""
    own = FileRecord(sha256=hashlib.sha256(text).hexdigest(), size=len(text))
    return card.model_copy(update={"files": {**card.files, README: own}})


def to_json(card: StudentCard) -> str:
    """The card as the text of distill.json. New fields are left out if unset: earlier versions do not know them."""
    unset = ADDED - card.model_dump(include=ADDED, exclude_defaults=True).keys()
    content = card.model_dump(mode="json", exclude=unset)
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


@dataclass(frozen=True)
class TrainingCost:
    """The cost of one of the stages that make a student."""

    stage: str
    work: str
    time: str
    place: str


@dataclass(frozen=True)
class Publication:
    """The part of a published student's model card that comes from its run. Plain text, except `rows`."""

    name: str
    picture: str = ""
    """name of the file with samples; empty: none"""
    measured: str = ""
    """description of the table of measurements"""
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    """cells as Markdown, in which untrusted text is escaped"""
    costs: list[TrainingCost] = field(default_factory=list)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distill"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"text": markdown.escape, "code": markdown.code}
    return environment.get_template("model_card.md.j2")


def readme(card: StudentCard, published: Publication | None = None) -> str:
    """The model card README.md. Text from the card or the run is escaped, since it may be untrusted."""
    facts: dict[str, Any] = card.model_dump()
    return _template().render(
        card=facts,
        sampler=SAMPLERS[card.sampler].words,
        more_calls=network_calls(card.sampler, 1) - 1,
        head=_head(card),
        steps=card.fewest_steps,
        trained=step_numbers.in_words(card.trained_for) if card.trained_for else "",
        supported=step_numbers.supported(card),
        call_steps=step_numbers.of_call(card),
        code=[name for name in card.files if name.endswith(".py")],
        lora_calls=lora_use.calls(card.files, card.component, "path/to/this/folder"),
        vector=len(card.shape) == 1,
        measured=measured.of(card.metrics, card.sampler),
        published=published,
    )


def _head(card: StudentCard) -> str:
    """The YAML metadata at the beginning of a model card, which the hub reads."""
    tags = ["distillation", "flow-matching", *(["image-generation"] if len(card.shape) > 1 else [])]
    head = {"library_name": "diffusers", "license": card.license or "other", "tags": tags}
    dumped: str = yaml.safe_dump(head, sort_keys=False, width=10 * LINE)
    return dumped
