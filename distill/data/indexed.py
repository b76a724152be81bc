"""How kinds of data whose images have an index are indexed and loaded."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from distill.data import arrayfile, index
from distill.data.index import FoundImages, ImageIndex
from distill.data.rows import ImageRows
from distill.data.source import DataSet
from distill.spec.datakind import ImageOptions
from distill.spec.dataspec import VideosData

_LOADED: dict[tuple[str, int, str, int], DataSet] = {}  # with decoded images; shared by all stages of the process
_INDEXES: dict[Path, ImageIndex] = {}  # by their path relative to a store or a run

K = TypeVar("K", bound=ImageOptions | VideosData)


@dataclass(frozen=True)
class IndexedImages(Generic[K]):
    """Loads data of one kind whose images have an index. Implements `data.KindLoader`."""

    found: Callable[[K, ImageIndex | None], FoundImages]
    """lists the images of a data set, without reading those that the given index knows"""
    rows: Callable[[K, ImageIndex], ImageRows]
    """the rows of an indexed data set"""
    made: Callable[[str, ImageRows, ImageIndex, K, int], DataSet]
    """makes the data set from its name, rows, index, options and seed"""
    keeps_decoded: bool = True
    """whether the data set keeps decoded images, so that later loads should return the same object"""

    def load(self, spec: K, seed: int, folder: Path | None, *, keep: bool, indexed: bool) -> DataSet:
        """See `data.load_data`."""
        known = None if folder is None else index.read(folder / spec.index_file)
        if indexed and known is not None:
            rows = self.rows(spec, known)
        else:
            rows, known = self._indexed(spec, known)
        loaded = self.made(spec.name, rows, known, spec, seed)
        key = (spec.model_dump_json(), seed, loaded.digest, known.head.written)
        if key not in _LOADED and keep and self.keeps_decoded:
            _LOADED[key] = loaded
        return _LOADED.get(key, loaded)

    def update_index(self, spec: K, store: Path, run: Path | None) -> None:
        """See `data.update_index`."""

        def make(known: ImageIndex | None) -> ImageIndex:
            return self._indexed(spec, known)[1]

        arrayfile.update(spec.index_file, store, run, read=index.read, make=make, write=index.write)

    def _indexed(self, spec: K, known: ImageIndex | None) -> tuple[ImageRows, ImageIndex]:
        """Lists the images of a data set and indexes those that are new or have changed."""
        place, started = spec.index_file, time.time_ns()
        known = _INDEXES.get(place, known)
        found = self.found(spec, known)
        now = index.make(found, known, started)
        _INDEXES[place] = now
        return found.rows, now
