"""Files and folders that appear whole or not at all, whatever happens to the process, the disk or the machine.

Each is written under a hidden name beside its own, brought to the disk, and renamed in one step. The hidden name,
`.NAME.tmp-TOKEN-LABEL`, says which process it belongs to (`Owner.label`): the next use of NAME removes what a killed
process left, and nothing of one that is alive.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distill.guard import RunError
from distill.owners import Owner

UNFINISHED = re.compile(r"\.(.+)\.(?:tmp|new)-(?:[0-9a-f]{8}-)?([0-9].*)")  # older versions had no token
ASIDE = re.compile(r"\.(.+)\.old(?:-[0-9a-f]{8}-([0-9].*))?")  # what `replace` has moved aside
FORGOTTEN_SECONDS = 86400.0
LONGEST = 80  # bytes of NAME: with token and label, a file name may have 255


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty hidden folder to fill; at the end of the block it is brought to the disk and becomes `path` in one step.

    Whatever goes wrong, `path` stays what it was, and the hidden folder is removed. OSError if `path` exists and is
    not an empty folder, unless `replace`. What is replaced is moved aside first: if the process is killed right then,
    the next replacement of `path` puts it back before it begins.
    """
    with hidden_folder(path) as folder:
        if replace:
            _restore(path)
        yield folder
        sync_tree(folder)
        if replace:
            _exchange(folder, path)
        else:
            folder.rename(path)
            sync_dir(path.parent)


@contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """A new hidden folder beside `path`; it is removed at the end unless the caller has renamed it."""
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        sync_dir(path.parent.parent)
    remove_abandoned(path.parent, path.name)
    folder = hidden(path)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` so that `path` holds either the old or the new content, whole, whatever happens."""
    with _written(path, content) as temporary:
        temporary.replace(path)


def write_first(path: Path, content: str | bytes) -> None:
    """`write_atomic`, unless another process has been first: then its content stays."""
    with _written(path, content) as temporary, suppress(FileExistsError):
        path.hardlink_to(temporary)


def write_json(path: Path, content: Any) -> None:  # noqa: ANN401  (anything json takes)
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(content, indent=2, sort_keys=False) + "\n")


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Fill a new folder with files, by their paths below it."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove what processes that are gone left unfinished in a folder: for one name, or all of it."""
    for path, of, label in _found(folder, UNFINISHED):
        if name is None or of == _stem(name):
            with suppress(OSError):  # another process removes it too, or it is another user's
                if is_abandoned(path, label):
                    remove(path)


def remove_unfinished(folder: Path, is_ours: Callable[[str], bool] = lambda name: True) -> None:
    """Remove all that is unfinished in a folder; is_ours: only for the names that no other process writes now."""
    for path, of, _ in _found(folder, UNFINISHED):
        if is_ours(of):
            remove(path)


def is_abandoned(path: Path, label: str) -> bool:
    """Whether the process of a label is gone. Of another host this is not known: then, whether nothing in `path` was
    written for a day.
    """
    owner = Owner.of_label(label)
    if owner is not None and owner.is_here:
        return not owner.is_alive()
    newest = max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    return time.time() - newest > FORGOTTEN_SECONDS


def hidden(path: Path, kind: str = "tmp") -> Path:
    """A hidden name beside `path` that only this process uses, once."""
    return path.with_name(f".{_stem(path.name)}.{kind}-{secrets.token_hex(4)}-{Owner.this().label}")


def discard(path: Path) -> None:
    """Remove a folder so that a kill never leaves a part of it under its own name."""
    trash = hidden(path)
    path.rename(trash)
    remove(trash)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Make a new folder durable, files first."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_dir(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_dir(folder)


def sync_dir(path: Path) -> None:
    """Make renames within `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _written(path: Path, content: str | bytes) -> Iterator[Path]:
    """A hidden file beside `path` that is on the disk; RunError if it, or what is done with it, fails."""
    temporary = hidden(path)
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; nothing was changed") from error
    finally:
        with suppress(OSError):  # it has been renamed, or could not be made
            temporary.unlink()
    sync_dir(path.parent)


def _exchange(folder: Path, path: Path) -> None:
    aside = hidden(path, "old")
    try:
        with suppress(FileNotFoundError):
            path.rename(aside)
        folder.rename(path)
        sync_dir(path.parent)  # before the old one is removed
    finally:
        _put_back(aside, path)


def _put_back(aside: Path, path: Path) -> None:
    """Give what was moved aside its place again; if that is taken, remove it."""
    with suppress(OSError):  # there is nothing, or another process was first
        if not os.path.lexists(path):
            aside.rename(path)
    with suppress(OSError):
        if os.path.lexists(path):
            remove(aside)


def _restore(path: Path) -> None:
    """Put back what a process that was killed had moved aside; one that is alive does it itself."""
    for aside, of, label in _found(path.parent, ASIDE):
        owner = Owner.of_label(label)
        if of == _stem(path.name) and (owner is None or not owner.is_here or not owner.is_alive()):
            _put_back(aside, path)


def _found(folder: Path, kind: re.Pattern[str]) -> list[tuple[Path, str, str]]:
    """The hidden files and folders of a kind: path, the name they are for (see `_stem`), label of their process."""
    found = ((path, kind.fullmatch(path.name)) for path in folder.iterdir())
    return [(path, match[1], match[2] or "") for path, match in found if match is not None]


def _stem(name: str) -> str:
    """A name, or, for a long one, a short one that stands for it alone."""
    content = os.fsencode(name)
    return name if len(content) <= LONGEST else f"{name[:10]}~{hashlib.sha256(content).hexdigest()[:16]}"
