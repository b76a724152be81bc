"""The guidance scale as an option of recipes."""

from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from distill.core.field_types import GuidanceRange, checked_range


def _scale(given: float | GuidanceRange) -> float | GuidanceRange:
    if isinstance(given, tuple):
        return checked_range(given)
    if not given >= 0:
        raise PydanticCustomError("negative", "a number, at least 0, or [low, high]")
    return given


GuidanceScale = Annotated[float | GuidanceRange, AfterValidator(_scale)]
"""A guidance scale, or the range [low, high] of those between which the user of a student can choose."""
