"""Finds the videos of a folder: each of its sub-folders with images is a video, whose frames they are."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from distill.core.errors import InputError
from distill.core.text import printable
from distill.spec.imagefiles import FolderEntries, files, stat_of, suffix_of, suffixes
from distill.spec.imagefolder import refuse_container

CAPTION = ".txt"  # end of the name of a caption, beside the folder of its video
SHOWN = 3  # names that a message lists


@dataclass(frozen=True)
class VideoFolder:
    """The frames of all videos of a folder, video by video."""

    root: Path
    names: list[str]
    """paths relative to root; bytes that are not UTF-8 are surrogates, as in the os module"""
    stats: list[os.stat_result | None]
    """stat of each file, with links followed; None: no permission, or a broken link"""
    counts: list[int]
    """how many frames each video has"""
    captions: list[str | None] | None
    """path of the file with the caption of each video, relative to root, if there is one; None: they are not used"""


def read(path: str, *, captions: bool) -> VideoFolder:
    """Lists the videos of the folder `path`.

    captions: whether the videos have captions. Raises InputError if the folder cannot be read, or has no videos.
    """
    refuse_container(path, "videos")
    if not Path(path).is_dir():
        raise InputError(
            f"data.path={printable(path)} is not a folder; give a folder with one sub-folder for each video"
        )
    videos: dict[str, list[tuple[str, os.stat_result | None]]] = {}
    texts: set[str] = set()
    for name, entry in files(path, _any):
        folder, slash, _ = name.rpartition("/")
        if suffix_of(name) == CAPTION:
            texts.add(name)
        elif suffix_of(name) not in suffixes():
            refuse_container(f"{path}/{name}", "videos")
        elif slash:
            videos.setdefault(folder, []).append((name, stat_of(entry)))
        else:
            raise InputError(
                f"data.path={printable(path)} contains images ({printable(name)}, ...), but each of its sub-folders "
                "must be a video with its frames; give the folder above, or move the images into a folder for each "
                "video"
            )
    if not videos:
        raise InputError(
            f"data.path={printable(path)} contains no videos; valid: a sub-folder for each video, with its frames as "
            "files like 000001.png"
        )
    order = sorted(videos, key=lambda folder: folder.split("/"))
    _refuse_captions(path, captions, sorted(texts & {folder + CAPTION for folder in order}))
    frames = [each for folder in order for each in sorted(videos[folder], key=lambda each: _by_number(each[0]))]
    return VideoFolder(
        Path(path),
        [name for name, _ in frames],
        [state for _, state in frames],
        [len(videos[folder]) for folder in order],
        [folder + CAPTION if folder + CAPTION in texts else None for folder in order] if captions else None,
    )


def _any(folder: str, entries: FolderEntries) -> None:
    """Accepts every folder."""


def _refuse_captions(path: str, wanted: bool, found: list[str]) -> None:
    """InputError if there are captions that are not used, or none although they are to be used."""
    shown = printable(", ".join(found[:SHOWN])) + (", ..." if len(found) > SHOWN else "")
    if found and not wanted:
        raise InputError(
            f"data.path={printable(path)} has captions ({shown}); set data.captions=true to use them, or remove them"
        )
    if wanted and not found:
        raise InputError(
            f"data.captions=true, but data.path={printable(path)} has no captions; valid: NAME{CAPTION} beside the "
            "folder NAME of each video"
        )


def _by_number(name: str) -> tuple[list[tuple[int, str]], str]:
    """A key that sorts frame2.png before frame10.png."""
    parts = re.findall(r"\d+|\D+", name.rpartition("/")[2])
    return [(int(part), "") if part.isdecimal() and part.isascii() else (-1, part) for part in parts], name
