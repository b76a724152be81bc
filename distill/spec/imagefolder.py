"""What a folder of images is, decided by its structure alone: which files are its images, and which classes they have.

- `dataset.json` in it (the format of EDM and StyleGAN3): its images and their labels.
- Sub-folders, otherwise: each is a class, in alphabetical order.
- Images alone: unconditional.

Refused, with what to give instead: folders of train/val/test splits, of every thousand images (FFHQ), captions, and
folders of kohya's trainers, since what their names or files say would be lost, or taken for classes. Hidden files and
folders and `__MACOSX` are skipped, links are followed.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.core.errors import InputError
from distill.core.text import printable

LABELS = "dataset.json"
MAX_CLASSES = 1_000_000  # more are a mistake: each costs a row of an embedding
PER_IMAGE = 10  # highest label, in units of the number of images: beyond it, labels are no class ids
ALWAYS = 1_000  # classes that few images may have
IGNORED = {"__MACOSX", "@eaDir"}  # of macOS and Synology
CAPTIONS = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}  # of `datasets`' image folders
CAPTION_SUFFIXES = {".txt", ".caption"}
PARTS = r"([-_]?(set|images|imgs|data))?[-_]?\d*"
TRAIN = re.compile(r"train(ing)?" + PARTS, re.IGNORECASE)
HELD_OUT = re.compile(r"(val|valid|validation|dev|test|testing|eval)" + PARTS, re.IGNORECASE)
REPEATS = re.compile(r"(\d+)_.+")  # kohya: 10_name is shown ten times an epoch
REFUSED = {  # of what Pillow opens
    *("EPS", "WMF"),  # are drawn by another program or the system
    *("FPX", "MIC"),  # are documents of many parts
    *("BLP", "IM"),  # are rare, and their readers fail in any way
}
SHOWN = 3  # names in a message
CONVERT = {  # ends of names -> what it is, and how its images become files
    **dict.fromkeys((".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst"), ("a tar archive", "unpack it with `tar -xf`")),
    ".zip": ("a zip archive", "unpack it with `unzip`"),
    **dict.fromkeys(
        (".npz", ".npy"), ("a file of NumPy arrays", "save each with PIL.Image.fromarray(array).save(NAME)")
    ),
    **dict.fromkeys((".mdb", ".lmdb"), ("an LMDB database", "write each of its images to a file")),
    **dict.fromkeys((".h5", ".hdf5"), ("an HDF5 file", "save each array with PIL.Image.fromarray(array).save(NAME)")),
    **dict.fromkeys((".tfrecord", ".tfrecords"), ("a TFRecord file", "write each of its images to a file")),
    **dict.fromkeys((".pt", ".pth", ".pkl"), ("a pickled file", "write each of its images to a file")),
    **dict.fromkeys(
        (".mp4", ".mkv", ".mov", ".avi", ".webm"),
        ("a video", "write its frames to files with `ffmpeg -i VIDEO FOLDER/%06d.png`"),
    ),
}


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, in order, and their classes."""

    root: Path
    names: list[str]
    """below root; one whose bytes are not UTF-8 holds surrogates, as in the os module"""
    stats: list[os.stat_result | None]
    """of the files that the names lead to; None: they may not be seen, or a link leads nowhere"""
    labels: list[int] | None
    """class id of each image; None: unconditional"""
    num_classes: int | None


class _Labels(BaseModel):
    """What is read of dataset.json."""

    model_config = ConfigDict(strict=True)

    labels: list[tuple[str, Annotated[int, Field(ge=0, lt=MAX_CLASSES)]]] | None
    """[file below the folder, class id] of every image; null: unconditional"""


@cache
def formats() -> tuple[str, ...]:
    """By Pillow's names, those that are read."""
    try:
        from PIL import Image  # which the control plane is installed without
    except ModuleNotFoundError as error:
        raise InputError("folders of images need the package pillow; pip install 'distill[train]' brings it") from error
    Image.init()
    return tuple(kind for kind in Image.OPEN if kind not in REFUSED)


@cache
def suffixes() -> frozenset[str]:
    """Of the files that are read, in lower case."""
    kinds = formats()
    from PIL import Image

    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds)


def has_classes(root: Path) -> bool:
    """Whether its images have classes, as far as is known without looking for images."""
    if os.path.lexists(root / LABELS):
        return _parsed(root / LABELS).labels is not None
    return bool(_classes(root))


def read(path: str) -> ImageFolder:
    """The folder `path`; InputError if it cannot be read, holds no images, or its folders are no classes."""
    root = Path(path)
    if not root.is_dir():
        refuse_container(path)
        raise InputError(f"data.path={path} is not a folder; give a folder of images, or of one folder per class")
    listed = os.path.lexists(root / LABELS)
    classes = [] if listed else _classes(root)
    _refuse_splits(path, classes)
    if len(classes) == 1:  # what a data set was unpacked into
        _refuse_splits(_below(path, classes[0]), _classes(root, classes[0]))
    names: list[str] = []
    stats: list[os.stat_result | None] = []
    other: str | None = None  # the first file that is no image
    for name, entry in _files(path):
        if _suffix(name) in suffixes():
            names.append(name)
            stats.append(_stat(entry))
        elif other is None:
            other = name
    if not names:
        if other is not None:
            refuse_container(f"{path}/{other}")
        raise InputError(f"data.path={path} holds no images; valid are files like .png, .jpg, .webp, .bmp, .tiff")
    if listed:
        labels = _of_file(root / LABELS, names)
        count = None if labels is None else count_classes(labels, str(root / LABELS))
        return ImageFolder(root, names, stats, labels, count)
    if not classes:
        return ImageFolder(root, names, stats, None, None)
    _refuse_mixed(path, classes, names)
    _refuse_buckets(path, classes, names)
    ids = {name: i for i, name in enumerate(classes)}
    return ImageFolder(root, names, stats, [ids[_top(name)] for name in names], len(classes))


def count_classes(labels: Sequence[int], where: str) -> int:
    """The number of classes that class ids 0, 1, 2 ... mean: one more than the highest, which is bounded."""
    low, high = min(labels, default=0), max(labels, default=0)
    most = min(MAX_CLASSES, max(ALWAYS, PER_IMAGE * len(labels)))
    if low < 0 or high >= most:
        raise InputError(
            f"{where}: class ids from {low} to {high} for {len(labels)} images, valid: 0 to {most - 1} (the number of "
            f"classes is the highest id + 1, at most {PER_IMAGE} for each image); number the classes 0, 1, 2 ..."
        )
    return high + 1


def refuse_container(path: str) -> None:
    """InputError for an archive, a database, a video ..., with the way to a folder of images."""
    found = next((value for end, value in CONVERT.items() if path.lower().endswith(end)), None)
    if found is not None:
        raise InputError(
            f"data.path: {printable(path)} is {found[0]}, which is not read; {found[1]}, and give the folder of these "
            "files with data.kind=images"
        )


# --- files ---


def _files(root: str) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """Every visible file below root, by name, in the order of sorted(root.rglob("*")); links to folders are followed.

    A link to a folder that contains it is skipped: everything behind it is there already.
    """
    seen: dict[tuple[int, int], str] = {}
    stack = [("", iter(_entries(root, "")), _ancestors(root))]
    while stack:
        folder, entries, above = stack[-1]
        for entry in entries:
            name = _below(folder, entry.name)
            if not _is_folder(entry):
                yield name, entry
                continue
            found = _identity(entry)
            if found in above:
                continue
            if found in seen:
                raise InputError(
                    f"data.path={root}: {printable(name)} and {printable(seen[found])} are the same folder, so its "
                    "images would count twice; remove one of the links"
                )
            seen[found] = name
            stack.append((name, iter(_entries(root, name)), above | {found}))
            break
        else:
            stack.pop()


def _entries(root: str, folder: str) -> list["os.DirEntry[str]"]:
    """What is visible in a folder, by name; captions are refused."""
    try:
        with os.scandir(_below(root, folder)) as found:
            entries = sorted((e for e in found if not _is_ignored(e.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"data.path={root}: the folder '{printable(folder) or '.'}' cannot be read: {error.strerror}"
        ) from error
    _refuse_dead_links(root, folder, entries)
    names = [entry.name for entry in entries]
    images = {_stem(name) for name in names if _suffix(name) in suffixes()}
    texts = [name for name in names if _suffix(name) in CAPTION_SUFFIXES and _stem(name) in images]
    captions = sorted(CAPTIONS.intersection(names)) or texts
    if captions:
        shown = printable(", ".join(_below(folder, name) for name in captions[:SHOWN]))
        raise InputError(
            f"data.path={root} has captions ({shown}{', ...' if len(captions) > SHOWN else ''}), which data of kind "
            "images does not take: they would be lost; give a folder of the images alone, in one sub-folder per class "
            "where there are classes"
        )
    return entries


def _refuse_dead_links(root: str, folder: str, entries: Sequence["os.DirEntry[str]"]) -> None:
    """A link that leads nowhere may have led to a folder, whose class would be missing. Images are named later."""
    for entry in entries:
        if _suffix(entry.name) not in suffixes() and entry.is_symlink() and _is_dead(entry):
            raise InputError(
                f"data.path={root}: the link {printable(_below(folder, entry.name))} is broken; repair or remove it"
            )


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name in IGNORED


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_dead(link: "os.DirEntry[str]") -> bool:
    try:
        link.stat()
    except FileNotFoundError:
        return True
    except OSError:  # it leads to itself, or must not be looked at
        return False
    return False


def _identity(entry: "os.DirEntry[str]") -> tuple[int, int]:
    found = entry.stat()
    return found.st_dev, found.st_ino


def _ancestors(root: str) -> frozenset[tuple[int, int]]:
    """Of a folder and all folders that contain it."""
    place = Path(root).resolve()
    return frozenset((found.st_dev, found.st_ino) for found in (each.stat() for each in (place, *place.parents)))


def _stat(entry: "os.DirEntry[str]") -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:
        return None


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def _suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return (dot + suffix).lower() if stem else ""


def _top(name: str) -> str:
    return name.partition("/")[0]


# --- classes ---


def _classes(root: Path, folder: str = "") -> list[str]:
    """The visible folders in it, or in a folder of it, by name."""
    place = root / folder
    above = _ancestors(str(place))
    try:
        with os.scandir(place) as found:
            entries = [entry for entry in found if not _is_ignored(entry.name)]
        folders = [entry for entry in entries if _is_folder(entry) and _identity(entry) not in above]
    except OSError as error:
        raise InputError(f"data.path={place} cannot be read: {error.strerror}") from error
    _refuse_dead_links(str(root), folder, entries)
    return sorted(entry.name for entry in folders)


def _refuse_splits(path: str, classes: Sequence[str]) -> None:
    """train, val and test are parts of a data set; 10_name says how often a trainer of kohya's shows an image."""
    train = [name for name in classes if TRAIN.fullmatch(name)]
    held_out = [name for name in classes if HELD_OUT.fullmatch(name)]
    if (train and held_out) or (classes and len(train) + len(held_out) == len(classes)):
        raise InputError(
            f"data.path={path} holds the parts of a data set ({', '.join([*train, *held_out])}), which are not classes;"
            f" give one of them: data.path={_below(path, [*train, *held_out][0])}"
        )
    repeats = [match[1] for match in map(REPEATS.fullmatch, classes) if match]
    if repeats and len(repeats) == len(classes) and (len(classes) == 1 or max(Counter(repeats).values()) > 1):
        raise InputError(
            f"data.path={path}: {printable(', '.join(classes[:SHOWN]))} are named like folders of kohya's trainers, "
            "REPEATS_NAME, which are not classes; give the folder itself (data.path="
            f"{printable(_below(path, classes[0]))}), or rename the folders where they are classes"
        )


def _refuse_buckets(path: str, classes: Sequence[str], names: Sequence[str]) -> None:
    """FFHQ (01000/01234.png) and the tools of EDM (00001/img00001234.png) part images by number, in thousands."""
    if not all(re.fullmatch(r"\d{5}", name) for name in classes):
        return
    numbers = [re.fullmatch(r"(\d{5})/(?:img)?(\d+)\.\w+", name) for name in names]
    if all(
        number is not None and int(number[2]) // 1000 in (int(number[1]), int(number[1]) / 1000) for number in numbers
    ):
        raise InputError(
            f"data.path={path}: {printable(', '.join(classes[:SHOWN]))} group the images by number and are not "
            f'classes; write {{"labels": null}} to {path}/{LABELS}, or the class of each image'
        )


def _refuse_mixed(path: str, classes: Sequence[str], names: Sequence[str]) -> None:
    """Images beside class folders, and class folders without images."""
    loose = [name for name in names if "/" not in name]
    if loose:
        raise InputError(
            f"data.path={path} holds images ({printable(', '.join(loose[:SHOWN]))}) beside folders "
            f"({printable(', '.join(classes[:SHOWN]))}); sub-folders are classes, so move the images into one"
        )
    empty = sorted(set(classes) - {_top(name) for name in names})
    if empty:
        raise InputError(f"data.path={path}: the class folders {printable(', '.join(empty[:5]))} hold no images")


def _parsed(path: Path) -> _Labels:
    if not path.is_file():
        raise InputError(f"{path} is not a file; remove it, or give the labels there")
    try:
        return _Labels.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else str(part) for part in first["loc"])
        raise InputError(
            f"{path}{f', {place}' if place else ''}: {first['msg']}; valid: "
            '{"labels": [["FILE", CLASS ID], ...]} with ids 0, 1, 2 ..., or {"labels": null} for no classes'
        ) from error


def _of_file(path: Path, names: Sequence[str]) -> list[int] | None:
    """The class id of each image, which dataset.json has to name."""
    listed = _parsed(path).labels
    if listed is None:
        return None
    ids: dict[str, int] = {}
    for name, label in listed:
        if ids.setdefault(name, label) != label:
            raise InputError(f"{path} gives {printable(name)} the classes {ids[name]} and {label}; remove one")
    missing = [name for name in names if name not in ids]
    gone = sorted(ids.keys() - set(names)) if len(ids) > len(names) - len(missing) else []
    for found, what in ((missing, "labels of images that are in the folder"), (gone, "images that it labels")):
        if found:
            shown = printable(", ".join(found[:SHOWN]))
            where = "it lacks" if found is missing else "the folder lacks"
            raise InputError(
                f"{path}: {where} {len(found)} {what} ({shown}{', ...' if len(found) > SHOWN else ''}); "
                "copy the whole data set, or correct the list"
            )
    return [ids[name] for name in names]
