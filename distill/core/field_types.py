"""Types of the fields of a spec, and of files that others may have written: names, lines of text, bounded numbers."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from distill.core.text import is_line


class FrozenModel(BaseModel):
    """The base of all that is read from a spec: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _one_line(text: str) -> str:
    if not is_line(text):
        raise PydanticCustomError("not_one_line", "must be one line of text without control characters")
    return text


LINE = 1000  # characters
Line = Annotated[str, Field(max_length=LINE), AfterValidator(_one_line)]
"""Text that may stand in a script, a log and a message: a line break in it would be a line of its own there."""
ScriptLine = Annotated[str, Field(max_length=100_000), AfterValidator(_one_line)]
"""The same, of a script, where a list of paths may be long."""
Label = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_one_line)]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
"""What file systems and programs in other languages can count."""
Positive = Annotated[int, Field(gt=0, lt=2**63, strict=True)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Far above what anybody uses; a larger number is a typing error, which would show only after hours of work.
MAX_STEPS, MAX_SAMPLES = 100_000, 100_000_000
MAX_SHARDS = 100_000  # files of a pair set: they lie in one folder, and their names have five digits
MAX_SHARD = 2**20  # pairs of a file, which is put together in memory; of a block, too
MAX_SOLVER_STEPS = 10_000
MAX_PARTS = 10_000  # jobs of an array
Steps = Annotated[int, Field(gt=0, le=MAX_STEPS)]
Pairs = Annotated[int, Field(gt=0, le=MAX_SHARDS * MAX_SHARD)]
ShardPairs = Annotated[int, Field(gt=0, le=MAX_SHARD)]
SolverSteps = Annotated[int, Field(gt=0, le=MAX_SOLVER_STEPS)]
Samples = Annotated[int, Field(gt=0, le=MAX_SAMPLES)]
Images = Annotated[int, Field(gt=0, le=10**13)]
Processes = Annotated[int, Field(gt=0, le=4096)]
"""or threads, or GPUs, of one machine"""
Minutes = Annotated[float, Field(gt=0, le=1e6)]
