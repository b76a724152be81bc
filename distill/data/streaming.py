"""Loads streams, and keeps their indexes in the store and in runs."""

from pathlib import Path

from distill.core import printing
from distill.core.errors import RunError
from distill.data import KindLoader, streamindex, streams
from distill.data.streamdata import StreamData
from distill.data.streamindex import StreamIndex
from distill.spec.model import HfData

_KNOWN: dict[Path, StreamIndex] = {}  # by their path relative to a store or a run


class _Streams:
    """Loads data of kind hf with `stream: true`. Implements `data.KindLoader` and `data.StreamLoader`."""

    def load(self, spec: HfData, seed: int, folder: Path | None, *, keep: bool, indexed: bool) -> StreamData:
        """See `data.load_data`. keep has no effect, because decoded images are not kept."""
        known = None if folder is None else _kept(spec, folder)
        index = known if indexed and known is not None else _current(spec, known)
        return StreamData(spec.name, index, spec, seed)

    def update_index(self, spec: HfData, store: Path, run: Path | None) -> None:
        """See `data.update_index`. The index of a run never changes, because it names the commit that the run reads."""
        if run is not None and _kept(spec, run) is not None:
            return
        known = _kept(spec, store)
        now = _current(spec, known)
        if known is None or known.digest != now.digest:
            try:
                streamindex.write(store / spec.index_file, now)
            except RunError as error:
                printing.warn(f"{error}; without an index in the store, each new run reads the ends of all files again")
        if run is not None:
            streamindex.write(run / spec.index_file, now)

    def run_files(self, spec: HfData) -> dict[str, bytes]:
        """The files of a new run, by relative path: the index, which names the commit that the run reads."""
        return {str(spec.index_file): streamindex.encoded(_current(spec, None))}

    def commit(self, spec: HfData, run: Path) -> str | None:
        """The commit that a run reads; None if the path is not a hub id, or it is not known yet."""
        index = _kept(spec, run)
        return None if index is None else index.head.commit


def _kept(spec: HfData, folder: Path) -> StreamIndex | None:
    """The index in a store or a run; None if there is none that can be used."""
    found = streamindex.read(folder / spec.index_file)
    if found is not None and found.head.format == 1 and spec.limit is not None and len(found.files) > 1:
        return None
    return found


def _current(spec: HfData, known: StreamIndex | None) -> StreamIndex:
    """The index of the stream as it is now; that of the newest commit when this process asked first."""
    place = spec.index_file
    if place not in _KNOWN:
        _KNOWN[place] = streams.make(spec, known)
    return _KNOWN[place]


LOADER: KindLoader[HfData] = _Streams()
