"""Field types for specs and for files from other users: names, lines of text, bounded numbers."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from distill.core.text import is_line, is_text


class FrozenModel(BaseModel):
    """Base class of all models of the spec: unknown keys are errors, and instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _one_line(text: str) -> str:
    if not is_line(text):
        raise PydanticCustomError("not_one_line", "must be one line of text without control characters")
    return text


def _below(text: str) -> str:
    if not is_text(text) or any(part in ("", ".", "..") for part in text.split("/")):
        raise PydanticCustomError("not_below", "must be a relative path without . and ..")
    return text


def _variant(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_]{1,64}", text):
        raise PydanticCustomError("not_a_variant", "must be 1 to 64 letters, digits or _")
    return text


def _function(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", text):
        raise PydanticCustomError("other_form", "no function", {"valid": "a function as module:function"})
    return text


LINE = 1000  # characters
Line = Annotated[str, Field(max_length=LINE), AfterValidator(_one_line)]
"""Text that may be inserted into a script, a log or a message, where a line break would start a new line."""
ScriptLine = Annotated[str, Field(max_length=100_000), AfterValidator(_one_line)]
"""Like `Line`, but longer, for a script that contains a list of paths."""
Label = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_one_line)]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
VariantName = Annotated[str, AfterValidator(_variant)]
FunctionName = Annotated[str, Field(max_length=LINE), AfterValidator(_function)]
Below = Annotated[str, AfterValidator(_below)]
"""A relative path that stays below its folder."""
Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
"""A count that fits into a signed 64-bit integer, as in file systems and other languages."""
Positive = Annotated[int, Field(gt=0, lt=2**63, strict=True)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
GuidanceRange = tuple[float, float]
"""(low, high) of the guidance scales that a network takes as an input."""


def middle(guidance_range: GuidanceRange) -> float:
    """The scale of this range that is used unless another is given."""
    return sum(guidance_range) / 2


def _as_tuple(given: object) -> object:
    return tuple(given) if isinstance(given, list) else given  # JSON has no tuples


def checked_range(given: GuidanceRange) -> GuidanceRange:
    """The range, if it is one."""
    if not 1 <= given[0] < given[1] <= 10_000:
        raise PydanticCustomError("not_a_range", "two numbers [low, high] with 1 <= low < high <= 10000")
    return given


CheckedRange = Annotated[tuple[Number, Number], BeforeValidator(_as_tuple), AfterValidator(checked_range)]
"""A `GuidanceRange` in a file: two numbers, in a list."""
Fraction = Annotated[float, Field(ge=0, le=1)]
EmaLength = Annotated[float, Field(ge=0.01, le=0.28)]
"""Standard deviation of the times that an average of weights covers, relative to the training; 0.289 is all of it."""
# Far above any real use. A larger number is a typing error, which would otherwise be noticed only after hours of work.
MAX_STEPS, MAX_SAMPLES = 100_000, 100_000_000
MAX_SHARDS = 100_000  # files of a pair set: they are in one folder, and their names have five digits
MAX_SHARD = 2**20  # pairs per file, which is assembled in memory; also samples per block
MAX_SOLVER_STEPS = 10_000
MAX_PARTS = 10_000  # jobs in an array
StepCount = Annotated[int, Field(gt=0, le=MAX_STEPS)]
PairCount = Annotated[int, Field(gt=0, le=MAX_SHARDS * MAX_SHARD)]
ShardPairs = Annotated[int, Field(gt=0, le=MAX_SHARD)]
SolverSteps = Annotated[int, Field(gt=0, le=MAX_SOLVER_STEPS)]
Samples = Annotated[int, Field(gt=0, le=MAX_SAMPLES)]
Tolerance = Annotated[float, Field(ge=1e-9, le=0.1)]
Images = Annotated[int, Field(gt=0, le=10**13)]
Processes = Annotated[int, Field(gt=0, le=4096)]
"""Number of processes, threads or GPUs of one machine."""
Minutes = Annotated[float, Field(gt=0, le=1e6)]
