"""What a run reads of a hub: a commit of a repository, and how to get it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Repository:
    """A commit of a repository that a run reads, and how to get it."""

    what: Literal["teacher", "data"]
    id: str
    revision: str | None
    """as the spec says"""
    commit: str
    part: Sequence[str]
    """what tells the part of the commit that is read"""
    link: str
    """where the run has it, below its `inputs`"""
    needs: Callable[[Path], list[tuple[Path, int]]]
    """folder of the copy -> places that will be written to, and bytes"""
    copy: Callable[[Path], object]
    """makes this folder, which does not exist yet"""
