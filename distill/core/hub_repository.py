"""A hub repository that a run reads from: the commit, and how to copy it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Repository:
    """A commit of a hub repository that a run reads from, and how to copy it."""

    what: Literal["teacher", "data"]
    id: str
    revision: str | None
    """as given in the spec; None: the default"""
    commit: str
    part: Sequence[str]
    """identifies the part of the commit that is read"""
    link: str
    """path of the copy in the run, relative to its `inputs` folder"""
    needs: Callable[[Path], list[tuple[Path, int]]]
    """folder of the copy -> [(path that will be written to, bytes)]"""
    download: Callable[[], Callable[[Path], None]]
    """downloads into the caches; the result copies from there into a folder, which must not exist yet"""
