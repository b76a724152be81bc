"""Atomic writing: a file or folder appears complete or not at all, even if the process or the machine crashes.

Each is written under a hidden name in the same folder, `.NAME.tmp-TOKEN-LABEL`, synced to disk (fsync), and renamed in
one step. LABEL identifies the process that writes it (see `owners`). If that process is killed, the next use of NAME
removes the unfinished file.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distill.core import lease
from distill.core.errors import RunError
from distill.core.owners import Owner

HIDDEN = re.compile(r"\.(.+)\.(tmp|new|old)-(?:[0-9a-f]{8}-)?([0-9].*)")  # older versions wrote "new", or no TOKEN
FORGOTTEN_SECONDS = 86400.0
LONGEST = 80  # bytes of NAME: with token and label it must fit into a file name of 255 bytes


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty hidden folder to fill. At the end of the block it is synced to disk and renamed to `path` in one step.

    After an error, `path` is unchanged and the hidden folder is removed. Raises OSError if `path` exists and is not an
    empty folder, unless `replace` is set. With `replace`, the old folder is moved aside first. If the process is killed
    at that moment, the next use of `path` moves the old folder back.
    """
    with hidden_folder(path) as folder:
        yield folder
        sync_tree(folder)
        lease.confirm()
        aside = hidden(path, "old")
        try:
            if replace:
                with suppress(FileNotFoundError):
                    path.rename(aside)
            folder.rename(path)
            sync(path.parent)  # before the old folder is removed
        finally:
            _put_back(aside, path)


@contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """A new hidden folder next to `path`. It is removed at the end unless the caller has renamed it."""
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        sync(path.parent.parent)
    clear_up(path.parent, path.name)
    folder = hidden(path)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomic(path: Path, content: str | bytes, *, replace: bool = True) -> None:
    """Write a file atomically: `path` always has either the old or the new content. Raises RunError if it cannot.

    replace: if False, an existing file is kept, since another process wrote it first.
    """
    lease.confirm()
    temporary = hidden(path)
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            with suppress(FileExistsError):
                path.hardlink_to(temporary)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; nothing was changed") from error
    finally:
        with suppress(OSError):  # it was renamed, or could not be created
            temporary.unlink()
    sync(path.parent)


def write_json(path: Path, content: Any) -> None:  # noqa: ANN401  (anything json takes)
    """Write indented JSON with `write_atomic`."""
    write_atomic(path, json.dumps(content, indent=2, sort_keys=False) + "\n")


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files into a new folder. files: relative path -> content."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def clear_up(folder: Path, name: str | None = None) -> None:
    """Remove the unfinished files in a folder whose processes have ended.

    name: only those of this name. If its old version was moved aside and no new one took its place, the old one is
    restored.
    """
    for path, of, kind, label in _hidden(folder):
        if name is None or of == _stem(name):
            with suppress(OSError):  # another process may remove it too, or it belongs to another user
                if kind == "old":
                    if name and Owner.of_label(label) and is_abandoned(path, label, seconds=-math.inf):
                        _put_back(path, folder / name)
                elif is_abandoned(path, label):
                    _remove(path)


def remove_unfinished(folder: Path, is_ours: Callable[[str], bool] = lambda name: True) -> None:
    """Remove unfinished files in a folder, also those of live processes.

    is_ours: whether to remove those of a name. It must be False for names that another process may be writing.
    """
    for path, of, kind, _ in _hidden(folder):
        if kind != "old" and is_ours(of):
            _remove(path)


def is_abandoned(path: Path, label: str, seconds: float = FORGOTTEN_SECONDS) -> bool:
    """Whether the process of a label has ended.

    If it cannot be looked up (another host, say), whether nothing in `path` was written for `seconds`.
    """
    owner = Owner.of_label(label)
    if owner is not None and owner.is_here:
        return not owner.is_alive()
    return time.time() - max(each.lstat().st_mtime for each in (path, *path.rglob("*"))) > seconds


def hidden(path: Path, kind: str = "tmp") -> Path:
    """A new hidden path next to `path`, unique to this process and this call."""
    return path.with_name(f".{_stem(path.name)}.{kind}-{secrets.token_hex(4)}-{Owner.this().label}")


def sync_tree(folder: Path) -> None:
    """Sync a new folder and everything in it to disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Sync a file to disk; for a folder, the list of names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_back(aside: Path, path: Path) -> None:
    """Move a folder that was moved aside back to `path`; if another version is there, remove the one moved aside."""
    if not os.path.lexists(path):
        try:
            aside.rename(path)
        except OSError as error:  # nothing was moved aside, or another process was first
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                return
    with suppress(OSError):  # `path` already has a newer version, so the one moved aside is not needed
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hidden(folder: Path) -> list[tuple[Path, str, str, str]]:
    """The hidden files and folders in a folder: (path, the final name (see `_stem`), kind, label) of each."""
    found = ((path, HIDDEN.fullmatch(path.name)) for path in folder.iterdir())
    return [(path, match[1], match[2], match[3]) for path, match in found if match is not None]


def _stem(name: str) -> str:
    """The name itself if it is short enough, else a short name with its hash."""
    content = os.fsencode(name)
    return name if len(content) <= LONGEST else f"{name[:10]}~{hashlib.sha256(content).hexdigest()[:16]}"
