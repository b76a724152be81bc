"""Real data: `load_data` loads a data set, `DataSource` reads it as a stream of batches.

`MODULES` says which module finds, indexes and loads data of a kind. To add a kind, add its class to `spec.dataspec`,
and here a module that defines `LOADER`. These modules are imported when they are needed, because some take a second.
"""

import importlib
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from distill.data.promptindex import FoundPrompts
from distill.data.prompts import Prompts
from distill.data.source import DataSet, DataSource
from distill.spec.datakind import DataKind
from distill.spec.dataspec import (
    CheckerboardData,
    DataSpec,
    DigitsData,
    HfData,
    ImagesData,
    LatentsData,
    MnistData,
    PromptsData,
    TarsData,
    VideosData,
)

__all__ = [
    "DataSet",
    "DataSource",
    "KindLoader",
    "PromptLoader",
    "StreamLoader",
    "load_data",
    "load_prompts",
    "loader_of",
    "run_files",
    "streamed_commit",
    "update_index",
]

MODULES: dict[type[DataKind], str] = {
    DigitsData: "arrays",
    MnistData: "arrays",
    CheckerboardData: "checkerboard",
    ImagesData: "folders",
    TarsData: "tars",
    HfData: "tables",
    LatentsData: "latents",
    PromptsData: "promptfiles",
    VideosData: "videos",
}
STREAMED = "streaming"  # data of any kind whose rows are read while training

K = TypeVar("K", bound=DataKind, contravariant=True)


@runtime_checkable
class KindLoader(Protocol[K]):
    """Finds, indexes and loads data of one kind. For the arguments see the functions of the same names below."""

    def load(self, spec: K, seed: int, folder: Path | None, *, keep: bool, indexed: bool) -> DataSet | None: ...
    def update_index(self, spec: K, store: Path, run: Path | None) -> None: ...


@runtime_checkable
class PromptLoader(Protocol[K]):
    """A `KindLoader` of data without samples, which has only prompts."""

    def load_prompts(self, spec: K, folder: Path | None, *, indexed: bool) -> FoundPrompts: ...


@runtime_checkable
class StreamLoader(Protocol[K]):
    """A `KindLoader` of data that is read while training, of which a run notes the version."""

    def run_files(self, spec: K) -> dict[str, bytes]: ...
    def commit(self, spec: K, run: Path) -> str | None: ...


def load_data(
    spec: DataSpec, seed: int, folder: Path | None = None, *, keep: bool = True, indexed: bool = False
) -> DataSet | None:
    """Loads the data set of a spec. Returns None for kinds none and prompts, which have no samples.

    seed: the seed of random crops and flips.
    folder: the folder of a store or a run. The index of the images is read from it if it has one (see `index`), but not
    written; `update_index` writes it.
    keep: cache the decoded images in this process for later loads of the same data set.
    indexed: use the index in the folder without checking it, because `update_index` was just called for it.
    """
    loader = loader_of(spec)
    return None if loader is None else loader.load(spec, seed, folder, keep=keep, indexed=indexed)


def load_prompts(spec: DataSpec, folder: Path | None = None, *, indexed: bool = False) -> Prompts | None:
    """Loads only the prompts of a spec's data. Returns None if it has none. folder, indexed: see `load_data`."""
    loader = loader_of(spec)
    if isinstance(loader, PromptLoader):
        return loader.load_prompts(spec, folder, indexed=indexed).prompts
    found = load_data(spec, 0, folder, keep=False, indexed=indexed)
    return None if found is None else found.prompts


def update_index(spec: DataSpec, store: Path, run: Path | None = None) -> None:
    """Writes the index of a data set in files, or its prompts, to the store, unless the store has an up-to-date one.

    run: the folder of a run, which gets its own copy, so that it does not depend on later changes in the store.

    If the index cannot be written to the store, only a warning is printed: that copy just saves time in later runs.
    """
    loader = loader_of(spec)
    if loader is not None:
        loader.update_index(spec, store, run)


def run_files(spec: DataSpec) -> dict[str, bytes]:
    """Files of a new run, by relative path: for a stream, its index, which names the commit that the run reads."""
    loader = loader_of(spec)
    return loader.run_files(spec) if isinstance(loader, StreamLoader) else {}


def streamed_commit(spec: DataSpec, run: Path) -> str | None:
    """The commit of the hub that a run streams; None if its data is not streamed from the hub."""
    loader = loader_of(spec)
    return loader.commit(spec, run) if isinstance(loader, StreamLoader) else None


def loader_of(spec: DataKind) -> KindLoader[DataKind] | None:
    """The loader of a kind of data; None if there is no data."""
    if not spec.has_samples and not spec.has_prompts:
        return None
    module = STREAMED if spec.is_streamed else MODULES[type(spec)]
    found = importlib.import_module(f"distill.data.{module}").LOADER
    assert isinstance(found, KindLoader)
    return found
