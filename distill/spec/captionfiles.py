"""Finds where the captions of a folder's images are stored, without reading them.

- Files NAME.txt or NAME.caption beside the image NAME.png.
- Or tables metadata.jsonl, metadata.csv or metadata.parquet, as in image folders of the `datasets` library. Their
  column `file_name` has paths relative to the table.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill.core.errors import InputError
from distill.core.text import printable
from distill.spec.imagefiles import FolderEntries, below, stat_of, stem_of, suffix_of, suffixes

TABLES = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
SUFFIXES = {".txt", ".caption"}
SHOWN = 3  # names that a message lists


@dataclass(frozen=True)
class CaptionFiles:
    """Where the captions of N images are stored: either in a file for each image, or in tables."""

    sidecars: list[str | None]
    """[N]: path, relative to the root, of the file with the caption of each image; None: it has none"""
    stats: list[os.stat_result | None]
    """[N]: stat of these files; None: there is no file, or no permission"""
    tables: list[str]
    """paths of the tables; empty: there are no tables"""


def is_caption_file(name: str) -> bool:
    """Whether a file may hold captions, by its name."""
    return suffix_of(name) in SUFFIXES or name.rpartition("/")[2] in TABLES


def refuse(root: str, folder: str, entries: FolderEntries) -> None:
    """Raises InputError if there are captions among the files of a folder, since they would not be used."""
    names = [entry.name for entry in entries]
    images = {stem_of(name) for name in names if suffix_of(name) in suffixes()}
    texts = [name for name in names if suffix_of(name) in SUFFIXES and stem_of(name) in images]
    captions = sorted(TABLES.intersection(names)) or texts
    if captions:
        raise InputError(
            f"data.path={root} has captions ({_listed([below(folder, name) for name in captions])}); set "
            "data.captions=true to train on them, or give a folder with only the images, in one sub-folder per class "
            "if there are classes"
        )


def find(root: str, images: Sequence[str], found: Mapping[str, "os.DirEntry[str]"]) -> CaptionFiles:
    """The caption files of these images. found: all files that may hold captions, by relative path.

    Raises InputError if there are none, if a file has no image, or if it is ambiguous which captions are meant.
    """
    tables = [name for name in found if name.rpartition("/")[2] in TABLES]
    _refuse_two_tables(root, tables)
    rows: dict[str, int] = {}
    other: dict[str, int] = {}  # the second image with the same name except for its suffix
    for row, image in enumerate(images):
        if rows.setdefault(stem_of(image), row) != row:
            other[stem_of(image)] = row
    sidecars: list[str | None] = [None] * len(images)
    stats: list[os.stat_result | None] = [None] * len(images)
    alone: list[str] = []
    for name, entry in found.items():
        stem = stem_of(name)
        if suffix_of(name) not in SUFFIXES:
            continue
        if stem not in rows:
            alone.append(name)
            continue
        row = rows[stem]
        if tables:
            raise InputError(
                f"data.path={root} has captions both in {printable(tables[0])} and beside the images "
                f"({printable(name)}); remove one of both"
            )
        if stem in other:
            raise InputError(
                f"data.path={root}: the caption {printable(name)} belongs to two images, {printable(images[row])} and "
                f"{printable(images[other[stem]])}; rename one of them"
            )
        if (first := sidecars[row]) is not None:
            raise InputError(
                f"data.path={root}: {printable(images[row])} has two captions, {printable(first)} and "
                f"{printable(name)}; remove one of them"
            )
        sidecars[row], stats[row] = name, stat_of(entry)
    if not tables and alone:
        raise InputError(
            f"data.path={root}: {len(alone)} caption files have no image ({_listed(alone)}); add the images, or remove "
            "these files"
        )
    if not tables and not any(sidecars):
        raise InputError(
            f"data.captions=true, but data.path={root} has no captions: no image has a file NAME.txt or NAME.caption "
            f"beside it, and there is no {', '.join(sorted(TABLES)[:-1])} or {max(TABLES)}; add captions, or remove "
            "data.captions"
        )
    return CaptionFiles(sidecars, stats, tables)


def _refuse_two_tables(root: str, tables: Sequence[str]) -> None:
    folders: defaultdict[str, list[str]] = defaultdict(list)
    for name in tables:
        folders[name.rpartition("/")[0]].append(name)
    for names in folders.values():
        if len(names) > 1:
            raise InputError(
                f"data.path={root} has several tables of captions in one folder ({_listed(names)}); remove all but one"
            )


def _listed(names: Sequence[str]) -> str:
    return printable(", ".join(names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
