"""Facts about published models, by which a plan knows their networks without their weights: the files in models/."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from distill.core import records
from distill.core.errors import InputError
from distill.core.field_types import FrozenModel
from distill.core.text import suggest

FOLDER = Path(__file__).parent / "models"

Extent = Annotated[int, Field(ge=1, le=1 << 20)]


class ModelFacts(FrozenModel):
    """What is known about the network of a published model, and from where."""

    title: str
    network: str
    """its class in diffusers"""
    config: dict[str, Any]
    """the options of the class that differ from its defaults"""
    config_source: str
    elements: Annotated[int, Field(ge=1)]
    """numbers in its weights, as published"""
    elements_source: str
    sample: Annotated[list[Extent], Field(min_length=3, max_length=4)]
    """shape of a sample as recipes hold it, [C, h, w] or [C, F, h, w], at the default size of its pipeline"""
    pixels: Annotated[list[Extent], Field(min_length=2, max_length=3)]
    """that size: height and width, with the number of frames before them for a video"""
    tokens: Extent
    """length of the longest prompt"""
    text_width: Extent
    """numbers in the embedding of a token"""
    pooled_width: Extent | None
    """numbers in the embedding of a whole prompt; None: the network does not take one"""
    call_source: str
    """where the default size and the length of the prompts come from"""


SCHEMA = records.Schema[ModelFacts](ModelFacts)


def names() -> list[str]:
    """The names of the models that facts are known about."""
    return sorted(path.name.removesuffix(".json") for path in FOLDER.glob("*.json"))


def facts_of(name: str) -> ModelFacts:
    """The facts about a model. InputError if there are none about a model of this name."""
    if name not in names():
        raise InputError(f"no facts about a model '{name}' are known; {suggest(name, names())}")
    return records.load(FOLDER / f"{name}.json", SCHEMA, "install the package again")
