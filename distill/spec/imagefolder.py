"""Finds the images of a folder and their classes, from the structure of the folder alone.

- With a file `dataset.json` (the format of EDM and StyleGAN3), the labels come from that file.
- Otherwise, each sub-folder is a class, in alphabetical order.
- A folder with images only is unconditional.

Some structures are refused with a hint, since their folders are not classes or information would be lost: train, val
and test splits, folders of a thousand images each (FFHQ), captions, and folders of kohya's trainers. Hidden files and
folders and `__MACOSX` are skipped. Links are followed.
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
MAX_CLASSES = 1_000_000  # more are taken as a mistake: each class needs a row of an embedding
PER_IMAGE = 10  # class ids up to this many times the number of images are valid
ALWAYS = 1_000  # class ids below this are valid for any number of images
IGNORED = {"__MACOSX", "@eaDir"}  # created by macOS and Synology
CAPTIONS = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}  # in image folders of the `datasets` library
CAPTION_SUFFIXES = {".txt", ".caption"}
PARTS = r"([-_]?(set|images|imgs|data))?[-_]?\d*"
TRAIN = re.compile(r"train(ing)?" + PARTS, re.IGNORECASE)
HELD_OUT = re.compile(r"(val|valid|validation|dev|test|testing|eval)" + PARTS, re.IGNORECASE)
REPEATS = re.compile(r"(\d+)_.+")  # kohya: images in 10_name are shown ten times per epoch
REFUSED = {  # formats that Pillow can open, but that are not read
    *("EPS", "WMF"),  # rendered by another program or the operating system
    *("FPX", "MIC"),  # compound documents
    *("BLP", "IM"),  # rare formats whose readers may raise any exception
}
SHOWN = 3  # names that a message lists
CONVERT = {  # suffix -> (what the file is, how to extract its images)
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
    """paths relative to root; bytes that are not UTF-8 are surrogates, as in the os module"""
    stats: list[os.stat_result | None]
    """stat of each file, with links followed; None: no permission, or a broken link"""
    labels: list[int] | None
    """class id of each image; None: unconditional"""
    num_classes: int | None


class _Labels(BaseModel):
    """The part of dataset.json that is read."""

    model_config = ConfigDict(strict=True)

    labels: list[tuple[str, Annotated[int, Field(ge=0, lt=MAX_CLASSES)]]] | None
    """[file below the folder, class id] of every image; null: unconditional"""


@cache
def formats() -> tuple[str, ...]:
    """The image formats that are read, by their names in Pillow. InputError if Pillow is not installed."""
    try:
        from PIL import Image  # a plain installation does not include Pillow
    except ModuleNotFoundError as error:
        raise InputError(
            "folders of images need the package pillow; pip install 'distill[train]' installs it"
        ) from error
    Image.init()
    return tuple(kind for kind in Image.OPEN if kind not in REFUSED)


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of the files that are read, in lower case."""
    kinds = formats()
    from PIL import Image

    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds)


def has_classes(root: Path) -> bool:
    """Whether the images of a folder have classes, decided without listing the images."""
    if os.path.lexists(root / LABELS):
        return _parsed(root / LABELS).labels is not None
    return bool(_classes(root))


def read(path: str) -> ImageFolder:
    """Read the folder `path`. InputError if it cannot be read, has no images, or its sub-folders are not classes."""
    root = Path(path)
    if not root.is_dir():
        refuse_container(path)
        raise InputError(f"data.path={path} is not a folder; give a folder of images, or one with a folder per class")
    listed = os.path.lexists(root / LABELS)
    classes = [] if listed else _classes(root)
    _refuse_splits(path, classes)
    if len(classes) == 1:  # probably the top folder of an unpacked archive
        _refuse_splits(_below(path, classes[0]), _classes(root, classes[0]))
    names: list[str] = []
    stats: list[os.stat_result | None] = []
    other: str | None = None  # the first file that is not an image
    for name, entry in _files(path):
        if _suffix(name) in suffixes():
            names.append(name)
            stats.append(_stat(entry))
        elif other is None:
            other = name
    if not names:
        if other is not None:
            refuse_container(f"{path}/{other}")
        raise InputError(f"data.path={path} contains no images; valid are files like .png, .jpg, .webp, .bmp, .tiff")
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
    """The number of classes: the highest class id + 1. InputError if an id is negative or implausibly high.

    where: the beginning of the message.
    """
    low, high = min(labels, default=0), max(labels, default=0)
    most = min(MAX_CLASSES, max(ALWAYS, PER_IMAGE * len(labels)))
    if low < 0 or high >= most:
        raise InputError(
            f"{where}: {len(labels)} images have class ids from {low} to {high}; valid: 0 to {most - 1} (the number of "
            f"classes is the highest id + 1, at most {PER_IMAGE} per image); number the classes 0, 1, 2 ..."
        )
    return high + 1


def refuse_container(path: str) -> None:
    """Raise InputError for an archive, a database, a video or the like, and say how to get a folder of images."""
    found = next((value for end, value in CONVERT.items() if path.lower().endswith(end)), None)
    if found is not None:
        raise InputError(
            f"data.path: {printable(path)} is {found[0]}, which is not read; {found[1]}, and give the folder of these "
            "files with data.kind=images"
        )


# --- files ---


def _files(root: str) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """(relative path, entry) of every visible file below root, in the order of sorted(root.rglob("*")).

    Links to folders are followed. A link to a folder that contains the link is skipped, to avoid an endless loop.
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
                    f"data.path={root}: {printable(name)} and {printable(seen[found])} link to the same folder, so its "
                    "images would be used twice; remove one of the links"
                )
            seen[found] = name
            stack.append((name, iter(_entries(root, name)), above | {found}))
            break
        else:
            stack.pop()


def _entries(root: str, folder: str) -> list["os.DirEntry[str]"]:
    """The visible entries of a folder, sorted by name. InputError if there are captions."""
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
            "images does not support; give a folder with only the images, in one sub-folder per class if there are "
            "classes"
        )
    return entries


def _refuse_dead_links(root: str, folder: str, entries: Sequence["os.DirEntry[str]"]) -> None:
    """Raise InputError for a broken link: it may have led to a folder, whose class would be missing.

    Broken links with the name of an image are reported later.
    """
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
    except OSError:  # a link to itself
        return False


def _is_dead(link: "os.DirEntry[str]") -> bool:
    try:
        link.stat()
    except FileNotFoundError:
        return True
    except OSError:  # a link to itself, or no permission
        return False
    return False


def _identity(entry: "os.DirEntry[str]") -> tuple[int, int]:
    found = entry.stat()
    return found.st_dev, found.st_ino


def _ancestors(root: str) -> frozenset[tuple[int, int]]:
    """The identities (see `_identity`) of a folder and all folders that contain it."""
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
    """The sorted names of the visible folders in root, or in its sub-folder `folder`."""
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
    """Refuse sub-folders that are splits (train, val, test), or kohya's folders like 10_name, with 10 repeats."""
    train = [name for name in classes if TRAIN.fullmatch(name)]
    held_out = [name for name in classes if HELD_OUT.fullmatch(name)]
    if (train and held_out) or (classes and len(train) + len(held_out) == len(classes)):
        raise InputError(
            f"data.path={path} contains the splits of a data set ({', '.join([*train, *held_out])}), which are not "
            f"classes; give one of them: data.path={_below(path, [*train, *held_out][0])}"
        )
    repeats = [match[1] for match in map(REPEATS.fullmatch, classes) if match]
    if repeats and len(repeats) == len(classes) and (len(classes) == 1 or max(Counter(repeats).values()) > 1):
        raise InputError(
            f"data.path={path}: {printable(', '.join(classes[:SHOWN]))} are named like folders of kohya's trainers "
            "(REPEATS_NAME), which are not classes; give one of these folders (data.path="
            f"{printable(_below(path, classes[0]))}), or rename them if they are classes"
        )


def _refuse_buckets(path: str, classes: Sequence[str], names: Sequence[str]) -> None:
    """Refuse sub-folders that group images by number, in thousands.

    FFHQ (01000/01234.png) and the tools of EDM (00001/img00001234.png) do so.
    """
    if not all(re.fullmatch(r"\d{5}", name) for name in classes):
        return
    numbers = [re.fullmatch(r"(\d{5})/(?:img)?(\d+)\.\w+", name) for name in names]
    if all(
        number is not None and int(number[2]) // 1000 in (int(number[1]), int(number[1]) / 1000) for number in numbers
    ):
        raise InputError(
            f"data.path={path}: {printable(', '.join(classes[:SHOWN]))} group the images by number and are not "
            f'classes; create {path}/{LABELS} with {{"labels": null}}, or with the class of each image'
        )


def _refuse_mixed(path: str, classes: Sequence[str], names: Sequence[str]) -> None:
    """Refuse images next to class folders, and class folders without images."""
    loose = [name for name in names if "/" not in name]
    if loose:
        raise InputError(
            f"data.path={path} contains images ({printable(', '.join(loose[:SHOWN]))}) next to folders "
            f"({printable(', '.join(classes[:SHOWN]))}); sub-folders are classes, so move the images into one"
        )
    empty = sorted(set(classes) - {_top(name) for name in names})
    if empty:
        raise InputError(f"data.path={path}: the class folders {printable(', '.join(empty[:5]))} contain no images")


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
    """The class id of each image from dataset.json; None if it says that there are no classes.

    Raises InputError unless the file lists exactly these images.
    """
    listed = _parsed(path).labels
    if listed is None:
        return None
    ids: dict[str, int] = {}
    for name, label in listed:
        if ids.setdefault(name, label) != label:
            raise InputError(f"{path} gives {printable(name)} the classes {ids[name]} and {label}; remove one")
    missing = [name for name in names if name not in ids]
    gone = sorted(ids.keys() - set(names)) if len(ids) > len(names) - len(missing) else []
    for found, what in ((missing, "images of the folder"), (gone, "images that the file lists")):
        if found:
            shown = printable(", ".join(found[:SHOWN]))
            where = "the file does not list" if found is missing else "the folder does not contain"
            raise InputError(
                f"{path}: {where} {len(found)} {what} ({shown}{', ...' if len(found) > SHOWN else ''}); "
                "copy the whole data set, or correct the file"
            )
    return [ids[name] for name in names]
