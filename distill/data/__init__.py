"""Real data: `load_data` loads a data set, `DataSource` reads it as a stream of batches."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from distill.core import printing
from distill.core.errors import RunError
from distill.data import arrays, captions, index, latent_index, promptfiles, tars, videos
from distill.data.images import ImageData
from distill.data.index import FoundImages, ImageIndex
from distill.data.latent_index import LatentIndex
from distill.data.latents import LatentData
from distill.data.promptfiles import FoundPrompts
from distill.data.prompts import Prompts
from distill.data.rows import FileRows, ImageRows
from distill.data.source import DataSet, DataSource
from distill.data.videos import VideoData
from distill.spec import imagefolder
from distill.spec.dataspec import PromptsData
from distill.spec.model import (
    DataSpec,
    DigitsData,
    HfData,
    ImageOptions,
    ImagesData,
    LatentsData,
    MnistData,
    TarsData,
    VideosData,
)

__all__ = [
    "DataSet",
    "DataSource",
    "load_data",
    "load_prompts",
    "run_files",
    "streamed_commit",
    "update_index",
]

_LOADED: dict[tuple[str, int, str, int], ImageData] = {}  # with decoded images; shared by all stages of the process
_INDEXES: dict[Path, ImageIndex] = {}  # by their path relative to a store or a run
_LATENT_INDEXES: dict[Path, LatentIndex] = {}

Index = TypeVar("Index", ImageIndex, LatentIndex, FoundPrompts)


def load_data(
    spec: DataSpec, seed: int, folder: Path | None = None, *, keep: bool = True, indexed: bool = False
) -> DataSet | None:
    """Loads the data set of a spec. Returns None for kinds none and prompts, which have no samples.

    seed: the seed of random crops and flips.
    folder: the folder of a store or a run. The index of the images is read from it if it has one (see `index`), but not
    written.
    keep: cache the decoded images in this process for later loads of the same data set.
    indexed: use the index in the run's folder without checking it, because `update_index` was called for this run.
    """
    match spec:
        case DigitsData():
            return arrays.digits()
        case MnistData():
            return arrays.mnist()
        case HfData(stream=True):
            from distill.data import streaming  # imported here because the datasets library takes a second

            return streaming.load(spec, seed, folder, indexed=indexed)
        case ImagesData() | TarsData() | HfData():
            return _images(spec, seed, folder, keep, indexed)
        case VideosData():
            return _videos(spec, seed, folder, indexed)
        case LatentsData():
            return _latents(spec, seed, folder, indexed)
    return None


def load_prompts(spec: DataSpec, folder: Path | None = None, *, indexed: bool = False) -> Prompts | None:
    """Loads only the prompts of a spec's data. Returns None if it has none. folder, indexed: see `load_data`."""
    if isinstance(spec, PromptsData):
        return promptfiles.load(spec, folder, indexed=indexed).prompts
    found = load_data(spec, 0, folder, keep=False, indexed=indexed)
    return None if found is None else found.prompts


def update_index(spec: DataSpec, store: Path, run: Path | None = None) -> None:
    """Writes the index of a data set in files, or its prompts, to the store, unless the store has an up-to-date one.

    run: the folder of a run, which gets its own copy, so that it does not depend on later changes in the store.

    If the index cannot be written to the store, only a warning is printed: that copy just saves time in later runs.
    """
    match spec:
        case HfData(stream=True):
            from distill.data import streaming

            streaming.update_index(spec, store, run)
        case ImagesData() | TarsData() | HfData() | VideosData():

            def images(known: ImageIndex | None) -> ImageIndex:
                return _indexed(spec, known)[1]

            _update(lambda folder: _place(spec, folder), index.read, images, index.write, store, run)
        case LatentsData():

            def latents(known: LatentIndex | None) -> LatentIndex:
                return _latent_index(spec, known)

            _update(
                lambda folder: latent_index.path(folder, spec),
                latent_index.read,
                latents,
                latent_index.write,
                store,
                run,
            )
        case PromptsData():

            def texts(known: FoundPrompts | None) -> FoundPrompts:
                return promptfiles.update(spec, known)

            _update(
                lambda folder: promptfiles.path(folder, spec), promptfiles.read, texts, promptfiles.write, store, run
            )


def _update(
    place: Callable[[Path], Path],
    read: Callable[[Path], Index | None],
    make: Callable[[Index | None], Index],
    write: Callable[[Path, Index], None],
    store: Path,
    run: Path | None,
) -> None:
    """See `update_index`. place: store or run -> path of its index. make: a known index -> that of today."""
    shared, own = place(store), None if run is None else place(run)
    kept = None if own is None else read(own)
    known = kept or read(shared)
    now = make(known)
    if kept is not None and now.head == kept.head:
        return
    if kept is not None or known is None or now.head != known.head:
        try:
            write(shared, now)
        except RunError as error:
            printing.warn(f"{error}; without an index of the data in the store, each new run reads all files again")
    if own is not None:
        write(own, now)


def _latents(spec: LatentsData, seed: int, folder: Path | None, indexed: bool) -> LatentData:
    known = None if folder is None else latent_index.read(latent_index.path(folder, spec))
    found = known if indexed and known is not None else _latent_index(spec, known)
    return LatentData(Path(spec.path).stem, found, spec, seed)


def _latent_index(spec: LatentsData, known: LatentIndex | None) -> LatentIndex:
    """The index of latents, in which only new and changed files are read."""
    place = latent_index.path(Path(), spec)
    _LATENT_INDEXES[place] = latent_index.make(spec, _LATENT_INDEXES.get(place, known))
    return _LATENT_INDEXES[place]


def run_files(spec: DataSpec) -> dict[str, bytes]:
    """Files of a new run, by relative path: for a stream, its index, which names the commit that the run reads."""
    if isinstance(spec, HfData) and spec.stream:
        from distill.data import streaming

        return streaming.run_files(spec)
    return {}


def streamed_commit(spec: DataSpec, run: Path) -> str | None:
    """The commit of the hub that a run streams; None if its data is not streamed from the hub."""
    if isinstance(spec, HfData) and spec.stream:
        from distill.data import streaming

        return streaming.commit(spec, run)
    return None


def _images(
    spec: ImagesData | TarsData | HfData, seed: int, folder: Path | None, keep: bool, indexed: bool
) -> ImageData:
    known = None if folder is None else index.read(_place(spec, folder))
    if indexed and known is not None:
        rows = _rows(spec, known)
    else:
        rows, known = _indexed(spec, known)
    name = _name(spec)
    kind = tars.TarImages if isinstance(spec, TarsData) and spec.buckets is None else ImageData
    loaded = kind(name, rows, known, spec, seed)
    key = (spec.model_dump_json(), seed, loaded.digest, known.head.written)
    if key not in _LOADED and keep:
        _LOADED[key] = loaded
    return _LOADED.get(key, loaded)


def _videos(spec: VideosData, seed: int, folder: Path | None, indexed: bool) -> VideoData:
    known = None if folder is None else index.read(_place(spec, folder))
    if indexed and known is not None:
        rows = _rows(spec, known)
    else:
        rows, known = _indexed(spec, known)
    return VideoData(Path(spec.path).name, rows, known, spec, seed)


def _name(spec: ImagesData | TarsData | HfData) -> str:
    if isinstance(spec, HfData):
        return Path(spec.path).stem
    part = f"-{spec.split}" if isinstance(spec, ImagesData) and spec.split is not None else ""
    return Path(spec.path).name + part


def _place(spec: ImageOptions | VideosData, folder: Path) -> Path:
    """The path of the index of a data set in a store or a run. Raises InputError if the data's path is inaccessible."""
    spec.refuse_hidden_place()
    return index.path(folder, spec)


def _indexed(
    spec: ImagesData | TarsData | HfData | VideosData, known: ImageIndex | None
) -> tuple[ImageRows, ImageIndex]:
    """Lists the images of a data set and indexes those that are new or have changed."""
    place = _place(spec, Path())
    known = _INDEXES.get(place, known)
    found = _found(spec, known)
    now = index.make(found, known, flatten=spec.background is not None)
    _INDEXES[place] = now
    return found.rows, now


def _found(spec: ImagesData | TarsData | HfData | VideosData, known: ImageIndex | None) -> FoundImages:
    if isinstance(spec, TarsData):
        return tars.found(spec, known)
    if isinstance(spec, VideosData):
        return videos.found(spec)
    if isinstance(spec, HfData):
        from distill.data import tables  # imported here because the datasets library takes a second

        return tables.found(spec, known)
    folder = imagefolder.read(spec.path, captions=spec.captions, split=spec.split)
    rows = FileRows(folder.root, len(folder.names), folder.names.__getitem__)
    texts = captions.of_folder(folder, known)
    return FoundImages(rows, folder.names, folder.stats, folder.labels, folder.num_classes, captions=texts)


def _rows(spec: ImagesData | TarsData | HfData | VideosData, known: ImageIndex) -> ImageRows:
    """The rows of an indexed data set. For files, the names come from the index."""
    if isinstance(spec, TarsData):
        return tars.rows(spec, known)
    if isinstance(spec, HfData):
        from distill.data import tables

        return tables.rows(spec)
    root = Path(spec.path) if isinstance(spec, VideosData) else spec.folder
    return FileRows(root, len(known), known.name)
