"""The caches that a run uses. They are in the store, STORE/caches/WHAT-KEY, and any number of runs can share them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from distill.core import records
from distill.core.atomic import write_json
from distill.core.errors import InputError, RunError
from distill.core.printing import warn
from distill.runs import todo
from distill.runs.run_store import RunPaths, runs
from distill.spec.model import CheckpointTeacher, RunSpec

What = Literal["latents", "prompts"]
FOLDER = "caches"  # in the store
UNUSED_SECONDS = 86400.0  # a cache that was used within the last day may belong to a run that is being created


@dataclass(frozen=True)
class UsedCache:
    """A cache of a run."""

    what: What
    folder: Annotated[str, Field(pattern=r"\Acaches/(latents|prompts)-[0-9a-f]{64}\z")]
    """relative to the store"""
    count: Annotated[int, Field(ge=0)]
    """number of images or prompts"""
    files: Annotated[int, Field(ge=0)]
    """number of shards"""
    digest: Annotated[str, Field(pattern=r"\A([0-9a-f]{64})?\z")] = ""
    """SHA-256 over its settings and the checksums of its shards; empty: it is not complete yet"""

    @property
    def unit(self) -> str:
        """What it consists of, in words."""
        return "images" if self.what == "latents" else "prompts"

    def place(self, store: Path) -> Path:
        return store / self.folder


@dataclass(frozen=True)
class _Noted:
    """The part of the files of a cache stage that is read."""

    caches: list[UsedCache]


NOTED = records.Schema[_Noted](_Noted)


def folder_of(what: What, key: str) -> str:
    """The folder of a cache, relative to the store."""
    return f"{FOLDER}/{what}-{key}"


def note(run: RunPaths, stage: str, caches: Sequence[UsedCache]) -> None:
    """Record which caches a stage makes, before it makes them."""
    write_json(run.stage(stage).caches, as_json(caches))


def as_json(caches: Sequence[UsedCache]) -> dict[str, object]:
    return {"caches": [asdict(each) for each in caches]}


def noted(run: RunPaths, stage: str) -> list[UsedCache] | None:
    """The caches of a stage that is done, or is making them; None if it has not begun. InputError if they cannot be
    read.
    """
    remedy = f"delete {run.stage(stage).root}, and resume the run"
    for path in (run.stage(stage).done, run.stage(stage).caches):
        try:
            return records.load(path, NOTED, remedy).caches
        except FileNotFoundError:
            continue
    return None


def of_run(run: RunPaths, spec: RunSpec) -> Mapping[What, UsedCache]:
    """The caches of a run whose cache stage is done; empty for other runs. RunError if one is not in the store."""
    if spec.cache is None or not run.stage(spec.cache).done.exists():
        return {}
    found = {each.what: each for each in noted(run, spec.cache) or []}
    for each in found.values():
        if not each.place(run.root.parent).is_dir():
            raise RunError(
                f"the {each.what} of run '{run.name}' are no longer in {each.place(run.root.parent)}; make them again "
                f"with: distill cache {run.root}"
            )
    return found


def refuse_other(run: RunPaths, used: UsedCache, digest: str) -> None:
    """InputError if the cache in the store is not the one that the run has used until now."""
    if digest != used.digest:
        raise InputError(
            f"{used.place(run.root.parent)} has the digest {digest[:12]}, but run '{run.name}' was started with "
            f"{used.digest[:12]}: the cache was made again, with another result. Restore the old one, or start "
            "another run"
        )


def unused(store: Path) -> list[Path]:
    """Folders of caches that no run uses, and that no run or command has used within the last day.

    If the caches of a run cannot be read, a warning is shown, and all caches are kept.
    """
    used = set()
    for run in runs(store):
        try:
            used |= _folders(run)
        except (InputError, RunError) as error:
            warn(f"{error}; no cache is deleted, because run '{run.name}' may need it")
            return []
    folders = [store / FOLDER / name for name in records.names(store / FOLDER)]
    before = time.time() - UNUSED_SECONDS
    return [
        path
        for path in folders
        if f"{FOLDER}/{path.name}" not in used
        and path.is_dir()
        and not path.is_symlink()
        and path.stat().st_mtime < before
    ]


def _folders(run: RunPaths) -> set[str]:
    """The caches of a run, relative to the store: those of its cache stage, and those that its spec names."""
    stages = records.names(run.root / "stages")
    noting = [name for name in stages if run.stage(name).caches.exists()]
    found = {each.folder for name in noting for each in noted(run, name) or []}
    spec, ours = todo.load_spec(run), (run.root.parent / FOLDER).resolve()
    named = [spec.data.place, spec.teacher.conditions if isinstance(spec.teacher, CheckpointTeacher) else None]
    places = [Path(each).resolve() for each in named if each is not None]
    return found | {f"{FOLDER}/{each.relative_to(ours).parts[0]}" for each in places if ours in each.parents}


def with_conditions(spec: RunSpec, run: RunPaths) -> RunSpec:
    """The spec with the embeddings in the run's cache as the conditions of its teacher, if it has such a cache."""
    used = of_run(run, spec).get("prompts")
    if used is None or not isinstance(spec.teacher, CheckpointTeacher):
        return spec
    conditions = str(used.place(run.root.parent))
    return spec.model_copy(update={"teacher": spec.teacher.model_copy(update={"conditions": conditions})})
