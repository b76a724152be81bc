"""Where images come from: a folder of files, or a data set of the `datasets` library."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import datasets
from datasets import Dataset, DatasetDict
from PIL import Image

from distill import hub
from distill.data.images import ImageData
from distill.guard import InputError, suggest
from distill.spec import HfData, ImagesData

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or every load, of local files too, would tell a host of it

_LOADED: dict[tuple[str, int, str], ImageData] = {}  # checking a large set takes long; stages of one process share it


def images(spec: ImagesData, seed: int, keep: bool) -> ImageData:
    """A folder of images in alphabetical order; its sub-folders, if any, are the classes."""
    root = Path(spec.path)
    if not root.is_dir():
        raise InputError(f"data.path={spec.path} is not a folder; give a folder of images, or of one folder per class")
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in known and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if not files:
        raise InputError(f"data.path={spec.path} holds no images; valid are files like .png, .jpg, .webp, .bmp, .tiff")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    labels = None
    if classes:
        names = [path.relative_to(root).parts[0] for path in files]
        loose = [path.name for path in files if path.parent == root]
        if loose:
            raise InputError(
                f"data.path={spec.path} holds images ({', '.join(loose[:3])}) beside folders "
                f"({', '.join(classes[:3])}); sub-folders are classes, so move the images into one"
            )
        empty = sorted(set(classes) - set(names))
        if empty:
            raise InputError(f"data.path={spec.path}: the class folders {', '.join(empty[:5])} hold no images")
        ids = {name: i for i, name in enumerate(classes)}
        labels = [ids[name] for name in names]
    stamp = repr([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    key = (spec.model_dump_json(), seed, stamp)
    if key in _LOADED:
        return _LOADED[key]
    rows = Dataset.from_dict({"image": [{"bytes": None, "path": str(path)} for path in files]})
    return _kept(key, ImageData(root.name, rows, labels, len(classes) or None, spec, seed), keep)


def hugging_face(spec: HfData, seed: int, keep: bool) -> ImageData:
    """A data set of the `datasets` library: a hub id, parquet, or a folder of save_to_disk."""
    rows = open_rows(spec)
    columns = rows.column_names
    for field, column in (("image_column", spec.image_column), ("label_column", spec.label_column)):
        if column is not None and column not in columns:
            raise InputError(f"data.{field}={column}: no such column; {suggest(column, columns)}")
    key = (spec.model_dump_json(), seed, rows._fingerprint)
    if key in _LOADED:
        return _LOADED[key]
    labels, num_classes = _class_ids(rows, spec.label_column) if spec.label_column else (None, None)
    encoded = _as_encoded(rows, spec)
    return _kept(key, ImageData(Path(spec.path).stem, encoded, labels, num_classes, spec, seed), keep)


def _kept(key: tuple[str, int, str], loaded: ImageData, keep: bool) -> ImageData:
    if keep:
        _LOADED[key] = loaded
    return loaded


def open_rows(spec: HfData) -> Dataset:
    """The rows of a split, as they lie there."""
    path = Path(spec.path)
    if spec.revision is not None and path.exists():
        raise InputError(
            f"data.revision={spec.revision} has no effect: {spec.path} lies here and is not a hub id; remove it"
        )
    with _readable(spec):
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={spec.split: str(path)}, split=spec.split)
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _split_of(datasets.load_from_disk(str(path)), spec)
        if path.is_dir():
            if not any(path.rglob("*.parquet")):
                found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
                raise InputError(
                    f"data.path={spec.path} holds neither parquet files nor a data set saved to disk, but {found}; "
                    "use data.kind=images for a folder of images"
                )
            return datasets.load_dataset("parquet", data_dir=str(path), split=spec.split)
        return _of_the_hub(spec)


@contextmanager
def _readable(spec: HfData) -> Iterator[None]:
    """Says what cannot be read, and why."""
    try:
        yield
    except InputError:
        raise
    except (*hub.UNREACHABLE, IndexError, datasets.exceptions.DatasetsError) as error:
        empty = isinstance(error, IndexError)  # what load_from_disk makes of a set without rows
        at = f" at revision {spec.revision}" if spec.revision else ""
        raise InputError(
            f"data.path={spec.path}{at} (split '{spec.split}') cannot be read: "
            f"{'it holds no rows' if empty else hub.reason(error)}; valid: a parquet file, a folder "
            "of parquet, a folder of save_to_disk, or a hub id that can be reached or is cached"
        ) from error


# --- by hub id ---


def is_id(spec: HfData) -> bool:
    """Whether the path is no place here."""
    return not Path(spec.path).exists()


def commit(spec: HfData) -> str:
    """What its revision stands for now."""
    with _readable(spec):
        return hub.commit("dataset", spec.path, spec.revision)


def files(spec: HfData) -> list[hub.File]:
    """Of the commit that is the spec's revision, what is read before there are rows: the files of all splits."""
    assert spec.revision is not None
    with _readable(spec):
        found = datasets.load_dataset_builder(spec.path, revision=spec.revision).config.data_files or {}
        names = {url.partition(f"@{spec.revision}/")[2] for urls in found.values() for url in urls}
        return [file for file in hub.files("dataset", spec.path, spec.revision) if file.name in names]


def fetched(spec: HfData) -> str:
    """Where a job finds the rows that were fetched for it, below its cache (see `inputs`)."""
    return "/".join(("fetched", *(quote(part, safe="") for part in (spec.path, spec.revision or "newest", spec.split))))


def _of_the_hub(spec: HfData) -> Dataset:
    """The revision that was asked for, or nothing: without the hub, the library takes the last one it has seen."""
    here = Path(datasets.config.HF_DATASETS_CACHE) / fetched(spec)
    if here.is_dir():
        return datasets.load_from_disk(str(here))
    if spec.revision is None:
        return datasets.load_dataset(spec.path, split=spec.split)
    commit = hub.commit("dataset", spec.path, spec.revision)
    rows = datasets.load_dataset(spec.path, revision=commit, split=spec.split)
    if not any(commit in Path(file["filename"]).parts for file in rows.cache_files):
        raise ValueError(f"without the hub there is another revision than {spec.revision} in the cache")
    return rows


def _split_of(saved: Dataset | DatasetDict, spec: HfData) -> Dataset:
    if isinstance(saved, DatasetDict):
        if spec.split not in saved:
            raise InputError(f"data.split={spec.split}: no such split; {suggest(spec.split, saved)}")
        return saved[spec.split]
    if saved.split is not None and str(saved.split) != spec.split:
        raise InputError(f"data.split={spec.split}: {spec.path} holds the split '{saved.split}' alone")
    return saved


def _as_encoded(rows: Dataset, spec: HfData) -> Dataset:
    """Only the image column, named "image", as {"bytes", "path"} without decoding."""
    rows = rows.select_columns([spec.image_column])
    if spec.image_column != "image":
        rows = rows.rename_column(spec.image_column, "image")
    feature = rows.features["image"]
    encoded = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
    binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary", "string")
    if not (isinstance(feature, datasets.Image) or encoded or binary):
        raise InputError(f"data.image_column={spec.image_column} holds {feature}, valid: encoded images or paths")
    return rows.cast_column("image", datasets.Image(decode=False))


def _class_ids(rows: Dataset, column: str) -> tuple[Sequence[int], int]:
    feature = rows.features[column]
    labels = list(rows[column])
    named = isinstance(feature, datasets.ClassLabel)
    if not named and not all(isinstance(label, int) for label in labels if label is not None):
        raise InputError(
            f"data.label_column={column} holds {feature}, valid: class ids 0, 1, 2 ...; convert names with "
            f"class_encode_column('{column}')"
        )
    num_classes = feature.num_classes if named else max((label for label in labels if label is not None), default=0) + 1
    wrong = [row for row, label in enumerate(labels) if label is None or not 0 <= label < num_classes]
    if wrong:
        raise InputError(
            f"data.label_column={column}: {len(wrong)} rows have no valid class id (row {wrong[0]}: "
            f"{labels[wrong[0]]}), valid: 0 to {num_classes - 1}; remove them"
        )
    return labels, num_classes
