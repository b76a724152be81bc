"""Lists the image files of a folder and its sub-folders.

Hidden files and folders and `__MACOSX` are skipped. Links are followed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from distill.core.errors import InputError
from distill.core.text import printable

IGNORED = {"__MACOSX", "@eaDir"}  # created by macOS and Synology
REFUSED = {  # formats that Pillow can open, but that are not read
    *("EPS", "WMF"),  # rendered by another program or the operating system
    *("FPX", "MIC"),  # compound documents
    *("BLP", "IM"),  # rare formats whose readers may raise any exception
}

FolderEntries = Sequence["os.DirEntry[str]"]


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


def files(root: str, check: Callable[[str, FolderEntries], None]) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """(relative path, entry) of every visible file below root, in the order of sorted(root.rglob("*")).

    check: called with the relative path and the entries of each folder before its files; may raise InputError.

    Links to folders are followed. A link to a folder that contains the link is skipped, to avoid an endless loop.
    """
    seen: dict[tuple[int, int], str] = {}

    def opened(folder: str) -> "Iterator[os.DirEntry[str]]":
        entries = _entries(root, folder)
        check(folder, entries)
        return iter(entries)

    stack = [("", opened(""), ancestors(root))]
    while stack:
        folder, entries, above = stack[-1]
        for entry in entries:
            name = below(folder, entry.name)
            if not is_folder(entry):
                yield name, entry
                continue
            found = identity(entry)
            if found in above:
                continue
            if found in seen:
                raise InputError(
                    f"data.path={root}: {printable(name)} and {printable(seen[found])} link to the same folder, so its "
                    "images would be used twice; remove one of the links"
                )
            seen[found] = name
            stack.append((name, opened(name), above | {found}))
            break
        else:
            stack.pop()


def _entries(root: str, folder: str) -> list["os.DirEntry[str]"]:
    """The visible entries of a folder, sorted by name."""
    try:
        with os.scandir(below(root, folder)) as found:
            entries = sorted((e for e in found if not is_ignored(e.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"data.path={root}: the folder '{printable(folder) or '.'}' cannot be read: {error.strerror}"
        ) from error
    refuse_dead_links(root, folder, entries)
    return entries


def refuse_dead_links(root: str, folder: str, entries: FolderEntries) -> None:
    """Raise InputError for a broken link: it may have led to a folder, whose class would be missing.

    Broken links with the name of an image are reported later.
    """
    for entry in entries:
        if suffix_of(entry.name) not in suffixes() and entry.is_symlink() and _is_dead(entry):
            raise InputError(
                f"data.path={root}: the link {printable(below(folder, entry.name))} is broken; repair or remove it"
            )


def is_ignored(name: str) -> bool:
    return name.startswith(".") or name in IGNORED


def is_folder(entry: "os.DirEntry[str]") -> bool:
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


def identity(entry: "os.DirEntry[str]") -> tuple[int, int]:
    found = entry.stat()
    return found.st_dev, found.st_ino


def ancestors(root: str) -> frozenset[tuple[int, int]]:
    """The identities (see `identity`) of a folder and all folders that contain it."""
    place = Path(root).resolve()
    return frozenset((found.st_dev, found.st_ino) for found in (each.stat() for each in (place, *place.parents)))


def stat_of(entry: "os.DirEntry[str]") -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:
        return None


def below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name


def stem_of(name: str) -> str:
    return name.rpartition(".")[0] or name


def suffix_of(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return (dot + suffix).lower() if stem else ""


def top_folder(name: str) -> str:
    return name.partition("/")[0]
