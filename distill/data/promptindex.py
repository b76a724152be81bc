"""The prompts of data of kind prompts as they are kept in STORE/indexes and RUN/indexes, once for all runs.

Other users may have written the files of a store, so every file is validated, and an invalid one is replaced.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from distill.core.text import printable
from distill.data import arrayfile, prompts, skipping
from distill.data.prompts import Prompts
from distill.spec.dataspec import PromptsData

FileState = tuple[str, int, int, int]  # path below the given one, size, mtime and ctime


class PromptsHead(BaseModel):
    """The metadata of kept prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    files: list[FileState]
    written: int
    """when reading started, in nanoseconds since 1970"""
    total: int = Field(ge=1)
    """number of lines or rows"""
    skipped: list[str]
    """the first of those without a usable prompt, and why"""


@dataclass(frozen=True)
class FoundPrompts:
    """The prompts of a data set, and what was skipped."""

    head: PromptsHead
    prompts: Prompts

    def refuse(self, spec: PromptsData) -> None:
        """Warns about lines and rows without a usable prompt. Raises InputError if there are too many."""
        if count := self.head.total - len(self.prompts):
            skipping.report(
                f"{printable(spec.path)}: {count:,} of {self.head.total:,} prompts cannot be used",
                [printable(each) for each in self.head.skipped],
                found=count,
                total=self.head.total,
                limit=spec.max_unreadable,
                todo="correct or remove them",
            )


def read(path: Path) -> FoundPrompts | None:
    """Reads kept prompts. Returns None if there are none, or if the file is damaged or of another version."""
    kept = arrayfile.read(path, PromptsHead)
    if kept is None or {name: (str(each.dtype), each.ndim) for name, each in kept[1].items()} != _ARRAYS:
        return None
    head, arrays = kept
    found = Prompts(arrays["content"].view(np.uint8), arrays["ends"].view(np.int64))
    fits = 0 < len(found) <= head.total and prompts.are_valid(found.content, found.ends)
    return FoundPrompts(head, found) if fits else None


_ARRAYS = {"content": ("uint8", 1), "ends": ("int64", 1)}


def write(path: Path, found: FoundPrompts) -> None:
    """Writes prompts atomically. Raises RunError if they cannot be written."""
    arrayfile.write(path, found.head, {"content": found.prompts.content, "ends": found.prompts.ends})
