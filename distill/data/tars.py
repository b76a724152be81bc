"""Finds the images of a WebDataset: tars, in which the files of a sample have the same name and different endings."""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from distill.core.errors import InputError
from distill.core.text import printable
from distill.data import KindLoader
from distill.data.facts import THREADS, times
from distill.data.images import ImageData
from distill.data.index import FoundImages, FoundInTars, ImageIndex, is_settled
from distill.data.indexed import IndexedImages
from distill.data.order import Ranges
from distill.data.prompts import CaptionFault, Captions, StoredCaption
from distill.data.rows import FileNames, ImageRows, TarRows
from distill.data.tarfiles import SampleKeys, TarContent, scan
from distill.shards.order import GROUP
from distill.spec import braces
from distill.spec.imagefolder import count_classes
from distill.spec.model import TarsData

SHOWN = 3  # names in a message


class TarImages(ImageData):
    """Images in tars, which are read one group of tars after the other."""

    group = GROUP

    @property
    def shards(self) -> Sequence[Sequence[range]]:
        """The items of each tar; see `source.ShardedData`."""
        assert self._index.tar_stops is not None
        return [Ranges(self._readable.before(self._index.tar_stops), len(self))]


def rows(spec: TarsData, known: ImageIndex) -> TarRows:
    """The rows of an indexed data set."""
    found = known.in_tars(Path(spec.folder))
    assert found is not None, "the index of another kind of data has another path"
    return found


def found(spec: TarsData, old: ImageIndex | None) -> FoundImages:
    """The samples of all tars, from their headers. Tars that are unchanged since the index `old` are not opened.

    Raises InputError if there are no tars, or one is missing, is not a regular file or is compressed.
    """
    names = _listed(spec)
    if old is not None and _is_unchanged(spec, names, old):
        labels = None if old.head.num_classes is None else old.labels.data
        known = FoundInTars(old.state, old.file, np.arange(len(old)))
        files, classes = FileNames(old.names, old.ends), old.head.num_classes
        return FoundImages(rows(spec, old), files, [], labels, classes, captions=old.captions, in_tars=known)
    contents: list[TarContent] = []
    before: list[int] = []  # for each tar, its first row in the old index; -1: it is new or has changed

    def captions() -> Iterator[StoredCaption]:
        for first, content in _contents(spec, names, old):
            yield from content.captions
            content.captions.clear()
            before.append(first)
            contents.append(content)

    texts = Captions.of(captions())
    sizes = [len(each.state) for each in contents]
    stops = np.cumsum(sizes, dtype=np.int64)
    same = np.arange(stops[-1]) - np.repeat(stops - sizes, sizes) + np.repeat(before, sizes)
    same[np.repeat(before, sizes) < 0] = -1
    files = FileNames(
        np.concatenate([each.names.content for each in contents]),
        np.concatenate([np.diff(each.names.ends, prepend=0) for each in contents]).cumsum(),
    )
    members = np.concatenate([each.members for each in contents])
    labels = None if spec.label_key is None else np.concatenate([each.labels for each in contents]).data
    in_tars = FoundInTars(
        np.concatenate([each.state for each in contents]),
        np.repeat(np.array([each.file for each in contents], np.int64), sizes, axis=0),
        same,
    )
    count = None if labels is None else count_classes(labels, f"data.label_key={spec.label_key}")
    tars = FileNames.of(map(os.fsencode, names))
    return FoundImages(
        TarRows(Path(spec.folder), tars, stops, members, files),
        files,
        [],
        labels,
        count,
        captions=None if spec.caption_key is None else texts,
        in_tars=in_tars,
    )


def _is_unchanged(spec: TarsData, names: Sequence[str], old: ImageIndex) -> bool:
    """Whether an index is of these tars as they are now."""
    known = rows(spec, old)
    if list(known.tars) != names:
        return False

    def is_same(start: int, name: str) -> bool:
        try:
            return is_settled(old, start, times((Path(spec.folder) / name).stat()))
        except OSError:
            return False

    with ThreadPoolExecutor(THREADS) as pool:
        return all(pool.map(is_same, [0, *known.stops[:-1].tolist()], names))


def _contents(spec: TarsData, names: Sequence[str], old: ImageIndex | None) -> Iterator[tuple[int, TarContent]]:
    """(first row in the old index or -1, content) of each tar, in order. Headers are read by several threads."""
    begins: dict[str, int] = {}  # of the tars in the old index
    if old is not None and (rows := old.in_tars(Path(spec.folder))) is not None:
        begins = dict(zip(rows.tars, [0, *rows.stops[:-1].tolist()], strict=True))
    one = partial(_content, spec, old, begins)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(names), 4 * THREADS):
            yield from pool.map(one, names[start : start + 4 * THREADS])


def _content(spec: TarsData, old: ImageIndex | None, begins: dict[str, int], name: str) -> tuple[int, TarContent]:
    path = Path(spec.folder) / name
    try:
        if old is not None and name in begins and is_settled(old, begins[name], times(path.stat())):
            return begins[name], _known(old, begins[name], name)
        return -1, scan(path, SampleKeys.of(spec.caption_key, spec.label_key))
    except OSError as error:
        raise InputError(f"data.path: {printable(str(path))} cannot be read: {error.strerror}") from error


def _known(old: ImageIndex, start: int, name: str) -> TarContent:
    """The content of a tar from an index."""
    rows = old.in_tars(Path())
    assert rows is not None
    stop = int(rows.stops[np.searchsorted(rows.stops, start, "right")])
    begin = int(old.ends[start - 1]) if start else 0
    names = FileNames(old.names[begin : int(old.ends[stop - 1])], old.ends[start:stop] - begin)
    captions: list[StoredCaption] = []
    if old.captions is not None:
        prompts = old.captions.prompts
        labelled = old.labels[start:stop].tolist()
        captions = [prompts[label] if label >= 0 else CaptionFault(-label) for label in labelled]
    labels = np.zeros(stop - start, np.int64) if old.head.num_classes is None else old.labels[start:stop]
    file: tuple[int, int, int] = tuple(old.file[start].tolist())
    return TarContent(file, names, rows.members[start:stop], old.state[start:stop], labels, captions)


# --- names ---


def _listed(spec: TarsData) -> list[str]:
    """The names of the tars, relative to spec.folder. InputError if there are none, or if some do not exist."""
    if "://" in spec.path or spec.path.startswith("pipe:"):
        raise InputError(
            f"data.path={printable(spec.path)[:300]}: tars are read from files of this machine; download them, and "
            "give their folder"
        )
    if (pattern := spec.pattern) is not None:
        names = sorted(set(braces.expanded(pattern)))
        missing = [name for name in names if not os.path.exists(Path(spec.folder) / name)]  # noqa: PTH110  (long names)
        if missing:
            shown = printable(", ".join(missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
            raise InputError(
                f"data.path={printable(spec.path)[:300]}: {len(missing)} of {len(names)} tars do not exist ({shown}); "
                "correct the pattern, or copy them"
            )
        return names
    path = Path(spec.path)
    if path.is_file():
        return [path.name]
    if not path.is_dir():
        raise InputError(
            f"data.path={printable(spec.path)[:300]} does not exist; give a .tar file, a folder of them, or a pattern "
            "like shards/{00000..00127}.tar"
        )
    return _of_folder(path)


def _of_folder(path: Path) -> list[str]:
    try:
        found = sorted(each.name for each in path.iterdir() if not each.name.startswith("."))
    except OSError as error:
        raise InputError(f"data.path={printable(str(path))} cannot be read: {error.strerror}") from error
    packed = [name for name in found if re.fullmatch(r".*\.(tgz|txz|tbz2?|tar\.\w+)", name, re.DOTALL)]
    if packed:
        raise InputError(
            f"data.path={printable(str(path))} contains compressed tars ({printable(', '.join(packed[:SHOWN]))}), "
            "whose images cannot be read in random order; decompress them, or remove them"
        )
    names = [name for name in found if name.endswith(".tar")]
    if not names:
        below = sorted(path.glob("*/*.tar"))
        hint = (
            f"the folder {below[0].parent.name} has some: give one folder" if below else "give a folder with .tar files"
        )
        raise InputError(f"data.path={printable(str(path))} contains no .tar files; {printable(hint)}")
    return names


def _made(name: str, rows: ImageRows, index: ImageIndex, options: TarsData, seed: int) -> ImageData:
    """The data set. With buckets, it is not read one group of tars after the other."""
    kind = TarImages if options.buckets is None else ImageData
    return kind(name, rows, index, options, seed)


LOADER: KindLoader[TarsData] = IndexedImages(found, rows, _made)
