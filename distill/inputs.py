"""Stub until the branch is merged."""

from collections.abc import Sequence
from pathlib import Path

from distill.spec import RunSpec
from distill.store import RunPaths


def resolve(spec: RunSpec, store: Path, before: Sequence[str] = ()) -> list[str]:
    return []


def record(inputs: Sequence[str]) -> dict[str, str]:
    return {}


def read(run: RunPaths) -> list[str]:
    return []


def link(run: RunPaths) -> None: ...


def environment(inputs: Sequence[str], root: Path) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
