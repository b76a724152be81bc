"""Which conditions the samples of an evaluation have."""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.core.atomic import write_atomic
from distill.core.errors import InputError
from distill.data import DataSet
from distill.data.source import Labelled
from distill.evaluation.pictures import REPORT_PIXELS, as_images, images_png
from distill.flow.conditioning import ConditionTable
from distill.spec.samplingspec import EvaluateStage
from distill.teachers import LoadedTeacher

COMPARED = 10_000  # prompts among which a similar one is looked for
COLUMNS, LINES = 12, 3  # of pictures, which show samples in the order of their prompts
REAL = "pictures/real.png"


@dataclass(frozen=True)
class PromptOrder:
    """The conditions of a table that samples use in turn.

    numbers: of the conditions. texts: the first conditions of the table in words, as far as they are known.
    count: of all conditions of the table.
    """

    numbers: Sequence[int]
    texts: Sequence[str]
    count: int

    @property
    def columns(self) -> int:
        """Of pictures, which show the first prompt in the first column."""
        return min(COLUMNS, len(self.numbers))

    @property
    def digest(self) -> str:
        """Of the order; empty if it is that of the table."""
        is_of_table = len(self.numbers) == self.count and all(map(int.__eq__, self.numbers, range(self.count)))
        return "" if is_of_table else hashlib.sha256(json.dumps(list(self.numbers)).encode()).hexdigest()

    def first_texts(self, count: int) -> list[str]:
        """The prompts of the first samples, at most one for each condition. Empty if one of them is not known."""
        wanted = self.numbers[:count]
        return [self.texts[number] for number in wanted] if max(wanted) < len(self.texts) else []


def of_stage(stage: EvaluateStage, teacher: LoadedTeacher, prompts: Sequence[str] | None) -> PromptOrder | None:
    """The order of the stage's prompts; None for a teacher without prompts.

    First those of `pictured`, then the others. If there are more of them than are used, these are spread evenly over
    them, because data is often sorted. InputError if a prompt of `pictured` is not known.

    prompts: of the teacher's conditions, in their order; None: only their captions are known.
    """
    if not isinstance(teacher.given, ConditionTable):
        for name in ("pictured", "samples_per_prompt"):
            if getattr(stage, name) != type(stage).model_fields[name].default:
                raise InputError(f"{name}: has no effect, because {teacher.description} takes no prompts; remove it")
        return None
    texts = teacher.given.prompts if prompts is None else prompts
    first = _numbers(stage.pictured, texts)
    count, others = teacher.given.count, teacher.given.count - len(first)
    wanted = -(-stage.samples // stage.samples_per_prompt)
    used = min(others, max(0, wanted - len(first)))
    spread = (_other(i * others // used, sorted(first)) for i in range(used))
    return PromptOrder([*first, *spread][:wanted], texts, count)


def _other(place: int, without: Sequence[int]) -> int:
    """The number at a place in 0, 1, 2, ... without some, which are sorted."""
    for number in without:
        place += number <= place
    return place


def _numbers(wanted: Sequence[str], texts: Sequence[str]) -> list[int]:
    """The numbers of the texts that are wanted."""
    known = {text: number for number, text in enumerate(texts)} if wanted else {}
    for text in wanted:
        if text not in known:
            near = difflib.get_close_matches(text, texts[:COMPARED], n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"they are like '{texts[0]}'" if texts else "none is known"
            raise InputError(f"pictured: '{text}' is not one of the {len(known):,} known prompts; {hint}")
    return list(dict.fromkeys(known[text] for text in wanted))


def real_picture(folder: Path, order: PromptOrder, data: DataSet) -> str | None:
    """Writes a picture of a real image for each of the first prompts, like those of samples, and returns its name.

    None if the data has no prompts. An image that there is none of is white.
    """
    if data.prompts is None or not isinstance(data, Labelled):
        return None
    items = [data.with_label(number) for number in order.numbers[: order.columns * LINES]]
    found = {item: data.items(0, [item]).samples[0] for item in items if item is not None}
    white = torch.ones(data.shape)
    images = torch.stack([white if item is None else found[item] for item in items])
    write_atomic(folder / REAL, images_png(as_images(images), order.columns, REPORT_PIXELS))
    return REAL
