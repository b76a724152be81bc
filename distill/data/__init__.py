"""Real data: `load_data` a set, and read it as a stream of batches through `DataSource`."""

from pathlib import Path

from distill.core import printing
from distill.core.errors import RunError
from distill.data import arrays, index
from distill.data.images import ImageData
from distill.data.index import FoundImages, ImageIndex
from distill.data.rows import FileRows, ImageRows
from distill.data.source import DataSet, DataSource
from distill.spec import imagefolder
from distill.spec.model import DataSpec, DigitsData, HfData, ImagesData, MnistData

__all__ = ["DataSet", "DataSource", "load_data", "update_index"]

_LOADED: dict[tuple[str, int, str, int], ImageData] = {}  # with their decoded images; stages of one process share them
_INDEXES: dict[Path, ImageIndex] = {}  # by where a store or a run keeps them


def load_data(
    spec: DataSpec, seed: int, folder: Path | None = None, *, keep: bool = True, indexed: bool = False
) -> DataSet | None:
    """The data set of a spec, None for kind none. `seed` keys random crops and flips.

    folder: a store or a run, where an index of the images may be (see `index`); it is not written. keep: hold the
    decoded images for the life of the process, so that the next load of the same set has them at once. indexed:
    `update_index` was called for this run, by any process, so the index in the run's folder is taken as it is.
    """
    match spec:
        case DigitsData():
            return arrays.digits()
        case MnistData():
            return arrays.mnist()
        case ImagesData() | HfData():
            return _images(spec, seed, folder, keep, indexed)
    return None


def update_index(spec: DataSpec, store: Path, run: Path | None = None) -> None:
    """Write the index of a set of images in the store, unless the one there is of the images as they are now.

    run: the folder of a run, which keeps its own: what others write in the store does not change what it reads. The
    store's only saves time, so that a run can do without.
    """
    if not isinstance(spec, ImagesData | HfData):
        return
    shared = _place(spec, store)
    own = None if run is None else _place(spec, run)
    kept = None if own is None else index.read(own)
    known = kept or index.read(shared)
    _, now = _indexed(spec, known)
    if kept is not None and now.head == kept.head:
        return
    if kept is not None or known is None or now.head != known.head:
        try:
            index.write(shared, now)
        except RunError as error:
            printing.warn(f"{error}; without an index in the store, other runs read all these images again")
    if own is not None:
        index.write(own, now)


def _images(spec: ImagesData | HfData, seed: int, folder: Path | None, keep: bool, indexed: bool) -> ImageData:
    known = None if folder is None else index.read(_place(spec, folder))
    if indexed and known is not None:
        rows = _rows(spec, known)
    else:
        rows, known = _indexed(spec, known)
    name = Path(spec.path).stem if isinstance(spec, HfData) else Path(spec.path).name
    loaded = ImageData(name, rows, known, spec, seed)
    key = (spec.model_dump_json(), seed, loaded.digest, known.head.written)
    if key not in _LOADED and keep:
        _LOADED[key] = loaded
    return _LOADED.get(key, loaded)


def _place(spec: ImagesData | HfData, folder: Path) -> Path:
    """Where a store or a run keeps the index of a set."""
    spec.refuse_hidden_place()
    return index.path(folder, spec)


def _indexed(spec: ImagesData | HfData, known: ImageIndex | None) -> tuple[ImageRows, ImageIndex]:
    """The set as it is now, and its index."""
    place = _place(spec, Path())
    found = _found(spec)
    now = index.make(found, _INDEXES.get(place, known), flatten=spec.background is not None)
    _INDEXES[place] = now
    return found.rows, now


def _found(spec: ImagesData | HfData) -> FoundImages:
    if isinstance(spec, HfData):
        from distill.data import tables  # here: the datasets library takes a second to import

        return tables.found(spec)
    folder = imagefolder.read(spec.path)
    rows = FileRows(folder.root, len(folder.names), folder.names.__getitem__)
    return FoundImages(rows, folder.names, folder.stats, folder.labels, folder.num_classes)


def _rows(spec: ImagesData | HfData, known: ImageIndex) -> ImageRows:
    """Of a set that is indexed: its folder is not looked through again."""
    if isinstance(spec, HfData):
        from distill.data import tables

        return tables.rows(spec)
    return FileRows(Path(spec.path), len(known), known.name)
