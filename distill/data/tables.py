"""Data sets read by the `datasets` library: a hub id, parquet files, or a folder of save_to_disk."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import datasets
from datasets import Dataset, DatasetDict
from huggingface_hub import constants

from distill import hub
from distill.core.errors import InputError, RunError
from distill.core.hub_repository import Repository
from distill.core.text import printable, suggest
from distill.data import KindLoader, texttables
from distill.data.images import ImageData
from distill.data.index import FoundImages, ImageIndex
from distill.data.indexed import IndexedImages
from distill.data.prompts import Captions
from distill.data.rows import Encoded, read_file
from distill.spec import imagefiles, imagefolder
from distill.spec.model import HfData

SHOWN = 5  # maximum number of names in a message
BATCH = 4096  # rows per batch when a table is scanned

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # otherwise every load, even of local files, sends a request


@dataclass(frozen=True)
class TableRows:
    """The images in the column "image" of a table, whose entries are {"bytes", "path"} or None."""

    table: Dataset

    def __len__(self) -> int:
        return len(self.table)

    def name(self, row: int) -> str:
        """The row number, and the path if there is one."""
        image = self.table[row]["image"]
        return f"row {row}" if image is None or not image["path"] else f"{printable(image['path'])} (row {row})"

    def read(self, row: int) -> Encoded | None:
        """The bytes in the row, or those of the file that it refers to; None if the row has neither."""
        image = self.table[row]["image"]
        if image is None or image["bytes"] is image["path"] is None:
            return None
        return Encoded(image["bytes"]) if image["bytes"] is not None else read_file(image["path"])


def rows(spec: HfData, known: ImageIndex) -> TableRows:
    """The images of an indexed data set. Raises InputError if it cannot be read or the columns do not fit.

    Raises RunError if it is not the one that was indexed.
    """
    table = _opened(spec)
    if not _is_of(table, known):
        had, has = f"{len(known):,}", f"{len(table):,}"
        how = f"it had {had} rows and has {has}" if had != has else "its files are not the same"
        raise RunError(
            f"data.path={printable(spec.path)} (split '{spec.split}') has changed since the data was indexed: {how}; "
            "restore the old files, then resume. If several machines train together, HF_DATASETS_CACHE must be one "
            "folder that they all share"
        )
    return TableRows(_as_encoded(table, spec))


def _is_of(table: Dataset, known: ImageIndex) -> bool:
    """Whether a table is the one that was indexed."""
    return known.head.stamp == _stamp(table) and len(known) == len(table)


def found(spec: HfData, known: ImageIndex | None = None) -> FoundImages:
    """The images of a data set with their class ids or captions, and with what `index` needs to detect changes.

    known: an earlier index, whose captions are used again if the table has not changed.
    """
    table = _opened(spec)
    captions = None
    if spec.caption_column is not None:
        captions = known.captions if known is not None and _is_of(table, known) else None
        captions = captions or Captions.of(_captions(table, spec.caption_column))
    labels, num_classes = _class_ids(table, spec.label_column) if spec.label_column else (None, None)
    encoded = _as_encoded(table, spec)
    files = _files(encoded)
    stats = [_stat(name) if name else None for name in files]
    return FoundImages(TableRows(encoded), files, stats, labels, num_classes, _stamp(table), captions)


def _opened(spec: HfData) -> Dataset:
    table = open_rows(spec)
    columns = table.column_names
    for field in ("image_column", "label_column", "caption_column"):
        column = getattr(spec, field)
        if column is not None and column not in columns:
            raise InputError(f"data.{field}={column}: no such column; {suggest(column, columns)}")
    return table


def _captions(table: Dataset, column: str) -> Iterator[bytes | None]:
    """Yields the caption of each row as it is stored. Raises InputError if the column does not hold texts."""
    feature = table.features[column]
    if not isinstance(feature, datasets.Value) or feature.dtype not in ("string", "large_string"):
        raise InputError(f"data.caption_column={column} contains {feature}; valid: columns of texts (string)")
    for batch in table.select_columns([column]).with_format("arrow").iter(batch_size=BATCH):
        for part in batch.column(column).chunks:
            yield from texttables.decoded(part)


def _files(table: Dataset) -> list[str]:
    """The path of the file that each row refers to, or "" if the row holds the image itself. Reads no image."""
    found: list[str] = []
    for batch in table.with_format("arrow").iter(batch_size=BATCH):
        for part in batch.column("image").chunks:
            absent, paths = part.field("bytes").is_null().to_pylist(), part.field("path").to_pylist()
            found += [path or "" if alone else "" for alone, path in zip(absent, paths, strict=True)]
    return found


def _stamp(table: Dataset) -> str:
    """The library's fingerprint of a table, with size and mtime of its files, because files may be replaced."""
    states = [
        (each.st_size, each.st_mtime_ns) for each in (Path(file["filename"]).stat() for file in table.cache_files)
    ]
    return f"{table._fingerprint} {states}"


def _stat(path: str) -> os.stat_result | None:
    try:
        return Path(path).stat()
    except OSError:
        return None


def open_rows(spec: HfData) -> Dataset:
    """Opens a split, with its rows in stored order. Raises InputError if it cannot be read."""
    path = Path(spec.path)
    if path.exists():
        imagefolder.refuse_container(spec.path)
    if spec.revision is not None and path.exists():
        raise InputError(
            f"data.revision={spec.revision} has no effect: {spec.path} is a local path, not a hub id; "
            "remove data.revision"
        )
    with _readable(spec):
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={spec.split: str(path)}, split=spec.split)
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _split_of(datasets.load_from_disk(str(path)), spec)
        if path.is_dir():
            if not any(path.rglob("*.parquet")):
                _refuse_folder(spec.path)
            return datasets.load_dataset("parquet", data_dir=str(path), split=spec.split)
        return _of_the_hub(spec)


def _refuse_folder(path: str) -> None:
    """Raises InputError for a folder without tables. The message suggests data.kind=images if there are images."""
    found = sorted(Path(path).rglob("*"))
    for file in found:
        imagefolder.refuse_container(str(file))
    names = ", ".join(dict.fromkeys(file.relative_to(path).parts[0] for file in found[:SHOWN])) or "nothing"
    images = any(file.suffix.lower() in imagefiles.suffixes() for file in found)
    raise InputError(
        f"data.path={path} contains neither parquet files nor a data set saved to disk, but {printable(names)}; "
        + ("use data.kind=images for a folder of images" if images else "give a folder of parquet files, or of images")
    )


@contextmanager
def _readable(spec: HfData) -> Iterator[None]:
    """Context manager: converts errors of the libraries to an InputError that says what cannot be read, and why."""
    try:
        yield
    except InputError:
        raise
    except (*hub.UNREACHABLE, IndexError, datasets.exceptions.DatasetsError) as error:
        empty = isinstance(error, IndexError)  # load_from_disk raises IndexError if there are no rows
        at = f" at revision {spec.revision}" if spec.revision else ""
        raise InputError(
            f"data.path={spec.path}{at} (split '{spec.split}') cannot be read: "
            f"{'it has no rows' if empty else hub.reason(error)}; valid: a parquet file, a folder "
            "of parquet, a folder written by save_to_disk, or a hub id that can be reached or is cached"
        ) from error


# --- by hub id ---


def repository(spec: HfData, commit: str | None = None) -> Repository:
    """The repository that a data set with a hub id reads. commit: None for the newest commit of its revision."""
    if commit is None:
        with _readable(spec):
            commit = hub.commit("dataset", spec.path, spec.revision)
    pinned = spec.model_copy(update={"revision": commit})

    def needs(folder: Path) -> list[tuple[Path, int]]:
        """The disk space needed, by place. The library downloads the files of all splits, not only of one."""
        with _readable(pinned):
            found = datasets.load_dataset_builder(pinned.path, revision=commit).config.data_files or {}
            names = {url.partition(f"@{commit}/")[2] for urls in found.values() for url in urls}
            files = [file for file in hub.files("dataset", pinned.path, commit) if file.name in names]
        missing = sum(file.bytes for file in files if not file.cached)
        rows = sum(file.bytes for file in files)  # a lower bound, because files may be compressed
        caches = datasets.config.HF_DATASETS_CACHE
        return [(Path(constants.HF_HUB_CACHE), missing), (Path(caches), rows), (folder, rows)]

    def download() -> Callable[[Path], None]:
        """A saved copy contains the images. Rows in the cache may only refer to files, and reading it takes a lock."""
        rows = open_rows(pinned)
        return lambda folder: rows.save_to_disk(str(folder))

    part, link = [spec.split], f"datasets/{fetched(spec)}"
    return Repository("data", spec.path, spec.revision, commit, part, link, needs, download)


def fetched(spec: HfData) -> str:
    """The path, relative to a job's cache, of the rows that were fetched for the job (see `prefetch`)."""
    return "/".join(("fetched", *(quote(part, safe="") for part in (spec.path, spec.revision or "newest", spec.split))))


def _of_the_hub(spec: HfData) -> Dataset:
    """Loads rows by hub id. If the spec names a revision, exactly that one is loaded, or ValueError is raised.

    The check is needed because the library silently uses the newest revision in its cache if the hub cannot be reached.
    """
    here = Path(datasets.config.HF_DATASETS_CACHE) / fetched(spec)
    if here.is_dir():
        return datasets.load_from_disk(str(here))
    if spec.revision is None:
        return datasets.load_dataset(spec.path, split=spec.split)
    commit = hub.commit("dataset", spec.path, spec.revision)
    rows = datasets.load_dataset(spec.path, revision=commit, split=spec.split)
    if not any(commit in Path(file["filename"]).parts for file in rows.cache_files):
        raise ValueError(f"the hub cannot be reached, and the cache contains another revision than {spec.revision}")
    return rows


def _split_of(saved: Dataset | DatasetDict, spec: HfData) -> Dataset:
    if isinstance(saved, DatasetDict):
        if spec.split not in saved:
            raise InputError(f"data.split={spec.split}: no such split; {suggest(spec.split, saved)}")
        return saved[spec.split]
    if saved.split is not None and str(saved.split) != spec.split:
        raise InputError(f"data.split={spec.split}: {spec.path} contains only the split '{saved.split}'")
    return saved


def _as_encoded(rows: Dataset, spec: HfData) -> Dataset:
    """Selects the image column, renames it to "image", and disables decoding: entries are {"bytes", "path"}.

    Raises InputError if the column does not hold images.
    """
    rows = rows.select_columns([spec.image_column])
    if spec.image_column != "image":
        rows = rows.rename_column(spec.image_column, "image")
    feature = rows.features["image"]
    encoded = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
    binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary", "string")
    if not (isinstance(feature, datasets.Image) or encoded or binary):
        raise InputError(
            f"data.image_column={spec.image_column} contains {feature}; valid: columns of encoded images or of paths"
        )
    return rows.cast_column("image", datasets.Image(decode=False))


def _class_ids(rows: Dataset, column: str) -> tuple[Sequence[int], int]:
    feature = rows.features[column]
    labels = list(rows[column])
    named = isinstance(feature, datasets.ClassLabel)
    if not named and not all(isinstance(label, int) for label in labels if label is not None):
        raise InputError(
            f"data.label_column={column} contains {feature}, valid: class ids 0, 1, 2 ...; convert names with "
            f"class_encode_column('{column}')"
        )
    highest = max((label for label in labels if label is not None), default=0)
    num_classes: int = feature.num_classes if named else highest + 1
    wrong = [row for row, label in enumerate(labels) if label is None or not 0 <= label < num_classes]
    if wrong:
        raise InputError(
            f"data.label_column={column}: {len(wrong)} rows have no valid class id (row {wrong[0]}: "
            f"{labels[wrong[0]]}), valid: 0 to {num_classes - 1}; remove them"
        )
    if not named:
        imagefolder.count_classes(labels, f"data.label_column={column}")
    return labels, num_classes


LOADER: KindLoader[HfData] = IndexedImages(found, rows, ImageData)
