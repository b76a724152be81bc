"""Loads streams, and keeps their indexes in the store and in runs."""

from pathlib import Path

from distill.core import printing
from distill.core.errors import RunError
from distill.data import streamindex, streams
from distill.data.streamdata import StreamData
from distill.data.streamindex import StreamIndex
from distill.spec.model import HfData

_KNOWN: dict[Path, StreamIndex] = {}  # by their path relative to a store or a run


def load(spec: HfData, seed: int, folder: Path | None, *, indexed: bool) -> StreamData:
    """See `data.load_data`."""
    known = None if folder is None else streamindex.read(_place(spec, folder))
    index = known if indexed and known is not None else _current(spec, known)
    return StreamData(Path(spec.path).stem, index, spec, seed)


def update_index(spec: HfData, store: Path, run: Path | None) -> None:
    """See `data.update_index`. The index of a run is never changed, because it names the commit that the run reads."""
    if run is not None and streamindex.read(_place(spec, run)) is not None:
        return
    shared = _place(spec, store)
    known = streamindex.read(shared)
    now = _current(spec, known)
    if known is None or known.digest != now.digest:
        try:
            streamindex.write(shared, now)
        except RunError as error:
            printing.warn(f"{error}; without an index in the store, each new run reads the ends of all files again")
    if run is not None:
        streamindex.write(_place(spec, run), now)


def run_files(spec: HfData) -> dict[str, bytes]:
    """The files of a new run, by relative path: the index, which names the commit that the run reads from then on."""
    return {str(_place(spec, Path())): streamindex.encoded(_current(spec, None))}


def commit(spec: HfData, run: Path) -> str | None:
    """The commit that a run reads; None if the path is not a hub id, or it is not known yet."""
    index = streamindex.read(_place(spec, run))
    return None if index is None else index.head.commit


def _place(spec: HfData, folder: Path) -> Path:
    spec.refuse_hidden_place()
    return streamindex.path(folder, spec)


def _current(spec: HfData, known: StreamIndex | None) -> StreamIndex:
    """The index of the stream as it is now; that of the newest commit when this process asked first."""
    place = _place(spec, Path())
    if place not in _KNOWN:
        _KNOWN[place] = streams.make(spec, known)
    return _KNOWN[place]
