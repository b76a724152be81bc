"""Finds the images of a folder and their classes, from the structure of the folder alone.

- With a file `dataset.json` (the format of EDM and StyleGAN3), the labels come from that file.
- Otherwise, each sub-folder is a class, in alphabetical order.
- A folder with images only is unconditional.

If the images have captions, sub-folders are not classes. Some structures are refused with a hint, since their folders
are not classes or information would be lost: train, val and test splits of which none is chosen, folders of a thousand
images each (FFHQ), captions that are not used, and folders of kohya's trainers.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.core.errors import InputError
from distill.core.printing import warn
from distill.core.text import printable, suggest
from distill.spec import captionfiles
from distill.spec.captionfiles import CaptionFiles
from distill.spec.imagefiles import (
    FolderEntries,
    ancestors,
    below,
    files,
    identity,
    is_folder,
    is_ignored,
    refuse_dead_links,
    stat_of,
    suffix_of,
    suffixes,
    top_folder,
)

LABELS = "dataset.json"
MAX_CLASSES = 1_000_000  # more are taken as a mistake: each class needs a row of an embedding
PER_IMAGE = 10  # class ids up to this many times the number of images are valid
ALWAYS = 1_000  # class ids below this are valid for any number of images
PARTS = r"([-_]?(set|images|imgs|data))?[-_]?\d*"
TRAIN = re.compile(r"train(ing)?" + PARTS, re.IGNORECASE)
HELD_OUT = re.compile(r"(val|valid|validation|dev|test|testing|eval)" + PARTS, re.IGNORECASE)
REPEATS = re.compile(r"(\d+)_.+")  # kohya: images in 10_name are shown ten times per epoch
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
    captions: CaptionFiles | None = None
    """where the captions of the images are; None: they are not used"""


class _Labels(BaseModel):
    """The part of dataset.json that is read."""

    model_config = ConfigDict(strict=True)

    labels: list[tuple[str, Annotated[int, Field(ge=0, lt=MAX_CLASSES)]]] | None
    """[file below the folder, class id] of every image; null: unconditional"""


def has_classes(root: Path) -> bool:
    """Whether the images of a folder have classes, decided without listing the images."""
    if os.path.lexists(root / LABELS):
        return _parsed(root / LABELS).labels is not None
    return bool(_classes(root))


def read(path: str, *, captions: bool = False, split: str | None = None) -> ImageFolder:
    """Lists the images of the folder `path`, or of its sub-folder `split`, with their class ids.

    captions: the images have captions (see `captionfiles`), and sub-folders are not classes.

    Raises InputError if the folder cannot be read, has no images, or its sub-folders are neither.
    """
    if not Path(path).is_dir():
        refuse_container(path)
        raise InputError(f"data.path={path} is not a folder; give a folder of images, or one with a folder per class")
    whole = Path(path)
    if split is not None:
        _refuse_other_split(path, split)
        path = below(path, split)
    root = Path(path)
    listed = os.path.lexists(root / LABELS)
    if listed and captions and _parsed(root / LABELS).labels is not None:
        raise InputError(
            f"data.captions=true, but {root / LABELS} has class labels; images have either captions or classes: remove "
            "data.captions or that file"
        )
    classes = [] if listed else _classes(root)
    _refuse_splits(path, classes, captions)
    if len(classes) == 1:  # probably the top folder of an unpacked archive
        _refuse_splits(below(path, classes[0]), _classes(root, classes[0]), captions)
    names: list[str] = []
    stats: list[os.stat_result | None] = []
    texts: dict[str, os.DirEntry[str]] = {}
    other: str | None = None  # the first file that is not an image
    for name, entry in files(path, _any if captions else partial(captionfiles.refuse, path)):
        if suffix_of(name) in suffixes():
            names.append(name)
            stats.append(stat_of(entry))
        elif captions and captionfiles.is_caption_file(name):
            texts[name] = entry
        elif other is None:
            other = name
    if not names:
        if other is not None:
            refuse_container(f"{path}/{other}")
        raise InputError(f"data.path={path} contains no images; valid are files like .png, .jpg, .webp, .bmp, .tiff")
    if captions:
        return ImageFolder(root, names, stats, None, None, captionfiles.find(path, names, texts))
    if listed:
        labels = _of_file(root / LABELS, names)
        count = None if labels is None else count_classes(labels, str(root / LABELS))
        return ImageFolder(root, names, stats, labels, count)
    if not classes:
        return ImageFolder(root, names, stats, None, None)
    _refuse_mixed(path, classes, names)
    _refuse_buckets(path, classes, names)
    ids = _ids(classes) if split is None else _ids_of_split(whole, split, classes)
    return ImageFolder(root, names, stats, [ids[top_folder(name)] for name in names], len(ids))


def _any(folder: str, entries: FolderEntries) -> None:
    """Accepts all files of a folder."""


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


def refuse_container(path: str, kind: str = "images") -> None:
    """Raise InputError for an archive, a database, a video or the like, and say how to get a folder of images.

    kind: of the data that is to be read.
    """
    found = next((value for end, value in CONVERT.items() if path.lower().endswith(end)), None)
    if found is not None:
        raise InputError(
            f"data.path: {printable(path)} is {found[0]}, which is not read; {found[1]}, and give the folder of these "
            f"files with data.kind={kind}"
        )


# --- classes ---


def _classes(root: Path, folder: str = "") -> list[str]:
    """The sorted names of the visible folders in root, or in its sub-folder `folder`."""
    place = root / folder
    above = ancestors(str(place))
    try:
        with os.scandir(place) as found:
            entries = [entry for entry in found if not is_ignored(entry.name)]
        folders = [entry for entry in entries if is_folder(entry) and identity(entry) not in above]
    except OSError as error:
        raise InputError(f"data.path={place} cannot be read: {error.strerror}") from error
    refuse_dead_links(str(root), folder, entries)
    return sorted(entry.name for entry in folders)


def _splits(folders: Sequence[str]) -> list[str]:
    """The folders that are named like splits of a data set, train first; empty if they are probably classes."""
    train = [name for name in folders if TRAIN.fullmatch(name)]
    held_out = [name for name in folders if HELD_OUT.fullmatch(name)]
    are_splits = (train and held_out) or len(train) + len(held_out) == len(folders)
    return [*train, *held_out] if are_splits else []


def _refuse_other_split(path: str, split: str) -> None:
    """Raises InputError if a folder has no splits, or not this one."""
    folders = _classes(Path(path))
    if not _splits(folders):
        raise InputError(
            f"data.split={printable(split)}: data.path={path} has no folders that are splits, such as train and val; "
            "remove data.split"
        )
    if split not in folders:
        raise InputError(
            f"data.split={printable(split)}: data.path={path} has no such folder; {printable(suggest(split, folders))}"
        )


def _refuse_splits(path: str, classes: Sequence[str], captions: bool) -> None:
    """Refuse sub-folders that are splits (train, val, test), or kohya's folders like 10_name, with 10 repeats."""
    if splits := _splits(classes):
        raise InputError(
            f"data.path={path} contains the splits of a data set ({', '.join(splits)}), which are not classes; choose "
            f"one of them: data.path={path} with data.split={splits[0]}"
        )
    repeats = [match[1] for match in map(REPEATS.fullmatch, classes) if match]
    if repeats and len(repeats) == len(classes) and (len(classes) == 1 or max(Counter(repeats).values()) > 1):
        why, change = "which are not classes", "if they are classes"
        if captions:
            why, change = "whose numbers of repeats are not applied", "to use each image once per epoch"
        raise InputError(
            f"data.path={path}: {printable(', '.join(classes[:SHOWN]))} are named like folders of kohya's trainers "
            f"(REPEATS_NAME), {why}; give one of these folders (data.path={printable(below(path, classes[0]))}), or "
            f"rename them {change}"
        )


def _ids(classes: Sequence[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(classes)}


def _ids_of_split(root: Path, split: str, classes: Sequence[str]) -> dict[str, int]:
    """The class ids of a split: those of the train split, if there is one with class folders.

    Raises InputError for classes that the train split does not have. Prints a warning if some of its classes are
    missing.
    """
    train = [name for name in _splits(_classes(root)) if TRAIN.fullmatch(name)]
    if len(train) != 1 or train[0] == split or os.path.lexists(root / train[0] / LABELS):
        return _ids(classes)
    known = _classes(root, train[0])
    if not known:
        return _ids(classes)
    if unknown := sorted(set(classes) - set(known)):
        raise InputError(
            f"data.split={split}: {len(unknown)} class folders ({_listed(unknown)}) are not in {root / train[0]}, so "
            "their class ids are not known; rename or remove them"
        )
    if missing := sorted(set(known) - set(classes)):
        warn(
            f"data.split={split} has no images of {len(missing)} of the {len(known)} classes of {train[0]} "
            f"({_listed(missing)}); class ids are those of {train[0]}"
        )
    return _ids(known)


def _listed(names: Sequence[str]) -> str:
    return printable(", ".join(names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")


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
    empty = sorted(set(classes) - {top_folder(name) for name in names})
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
