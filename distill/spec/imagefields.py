"""Types of the fields of `data` that say what size images have, how they are converted, and what a key of a tar may be.

Does not import torch.
"""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, WrapValidator
from pydantic_core import PydanticCustomError

from distill.core.field_types import FrozenModel
from distill.spec import bucketing

SideLength = Annotated[int, Field(ge=1, le=16384)]  # length of a side
Level = Annotated[int, Field(ge=0, le=255)]  # one channel of a colour


def _as_tuple(given: object) -> object:
    """A list as a tuple: JSON and YAML have only lists, and strict validation does not convert them."""
    return tuple(given) if isinstance(given, list) else given


def _size(given: object, check: Callable[[object], int | tuple[int, int]]) -> int | tuple[int, int]:
    """Normalise [N, N] to N, so that both give the same spec and digest."""
    try:
        size = check(_as_tuple(given))
    except ValidationError as error:
        raise other_form("N or [height, width], whole numbers from 1 to 16384") from error
    return size[0] if isinstance(size, tuple) and size[0] == size[1] else size


def _background(given: object, check: Callable[[object], object]) -> object:
    try:
        return check(_as_tuple(given))
    except ValidationError as error:
        raise other_form("white, black or [red, green, blue], whole numbers from 0 to 255") from error


def other_form(valid: str) -> PydanticCustomError:
    """One error for a union; pydantic would report one for each of its members."""
    return PydanticCustomError("other_form", "must be {valid}", {"valid": valid})


def key_of(*plain: str) -> AfterValidator:
    """The check of a key of tars: an ending, or a field of the JSON."""

    def check(key: str) -> str:
        if key not in plain and not (key.startswith("json.") and len(key) > len("json.")):
            raise other_form(f"{', '.join(plain)} or json.FIELD")
        return key

    return AfterValidator(check)


def _video_size(given: object, check: Callable[[object], object]) -> object:
    try:
        return check(_as_tuple(given))
    except ValidationError as error:
        raise other_form("[frames, height, width], whole numbers from 1 to 16384") from error


class Buckets(FrozenModel):
    """Samples of several sizes with nearly the same area. Each image belongs to the size of the most similar aspect
    ratio; a batch has images of one size.
    """

    step: SideLength = 64
    """height and width of each size are multiples of it"""
    max_aspect: Annotated[float, Field(gt=1, le=100)] = 2.0
    """the longer side of a size is at most this many times the shorter one"""


def _fits(given: Buckets | None, info: ValidationInfo) -> Buckets | None:
    """ValueError if there are no other sizes than the data's, or if it is none of them."""
    if given is not None and "size" in info.data:
        bucketing.checked(sides(info.data["size"]), given.step, given.max_aspect)
    return given


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


ImageSize = Annotated[SideLength | tuple[SideLength, SideLength], WrapValidator(_size)]
VideoSize = Annotated[tuple[SideLength, SideLength, SideLength], WrapValidator(_video_size)]
Background = Annotated[Literal["white", "black"] | tuple[Level, Level, Level] | None, WrapValidator(_background)]
FittingBuckets = Annotated[Buckets | None, AfterValidator(_fits)]
