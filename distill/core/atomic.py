"""Files and folders that appear whole or not at all, whatever happens to the process, the disk or the machine.

Each is written under a hidden name beside its own, `.NAME.tmp-TOKEN-LABEL`, brought to the disk, and renamed in one
step. LABEL says which process it belongs to (see `owners`): the next use of NAME removes what a killed process left.
"""

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

HIDDEN = re.compile(r"\.(.+)\.(tmp|new|old)-(?:[0-9a-f]{8}-)?([0-9].*)")  # "new", and without TOKEN: older versions
FORGOTTEN_SECONDS = 86400.0
LONGEST = 80  # bytes of NAME: with token and label, a file name may have 255


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty hidden folder to fill; at the end of the block it is brought to the disk and becomes `path` in one step.

    Whatever goes wrong, `path` stays what it was, and the hidden folder is removed. OSError if `path` exists and is
    not an empty folder, unless `replace`. What is replaced is moved aside first: if the process is killed right then,
    the next use of `path` begins by putting it back.
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
            sync(path.parent)  # before the old one is removed
        finally:
            _put_back(aside, path)


@contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """A new hidden folder beside `path`; it is removed at the end unless the caller has renamed it."""
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
    """Write `content` so that `path` holds either the old or the new content, whole, whatever happens.

    replace: else a file that is there stays, because another process has been first.
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
        with suppress(OSError):  # it has been renamed, or could not be made
            temporary.unlink()
    sync(path.parent)


def write_json(path: Path, content: Any) -> None:  # noqa: ANN401  (anything json takes)
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(content, indent=2, sort_keys=False) + "\n")


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Fill a new folder with files, by their paths below it."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def clear_up(folder: Path, name: str | None = None) -> None:
    """Remove what processes that are gone left unfinished in a folder; of one name, also restore what they replaced."""
    for path, of, kind, label in _hidden(folder):
        if name is None or of == _stem(name):
            with suppress(OSError):  # another process clears up too, or it is another user's
                if kind == "old":
                    if name and Owner.of_label(label) and is_abandoned(path, label, seconds=-math.inf):
                        _put_back(path, folder / name)
                elif is_abandoned(path, label):
                    _remove(path)


def remove_unfinished(folder: Path, is_ours: Callable[[str], bool] = lambda name: True) -> None:
    """Remove all that is unfinished in a folder; is_ours: only for the names that no other process writes now."""
    for path, of, kind, _ in _hidden(folder):
        if kind != "old" and is_ours(of):
            _remove(path)


def is_abandoned(path: Path, label: str, seconds: float = FORGOTTEN_SECONDS) -> bool:
    """Whether the process of a label is gone. For another host: whether nothing in `path` was written for so long."""
    owner = Owner.of_label(label)
    if owner is not None and owner.is_here:
        return not owner.is_alive()
    return time.time() - max(each.lstat().st_mtime for each in (path, *path.rglob("*"))) > seconds


def hidden(path: Path, kind: str = "tmp") -> Path:
    """A hidden name beside `path` that only this process uses, once."""
    return path.with_name(f".{_stem(path.name)}.{kind}-{secrets.token_hex(4)}-{Owner.this().label}")


def sync_tree(folder: Path) -> None:
    """Make a new folder durable, with all that is in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Make a file durable, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_back(aside: Path, path: Path) -> None:
    """Give what was moved aside its place again; if that is taken, remove it."""
    with suppress(OSError):  # there is nothing, or another process was first
        if not os.path.lexists(path):
            aside.rename(path)
    with suppress(OSError):
        if os.path.lexists(path):
            _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hidden(folder: Path) -> list[tuple[Path, str, str, str]]:
    """The hidden files and folders of processes: path, the name they are for (see `_stem`), kind, and label."""
    found = ((path, HIDDEN.fullmatch(path.name)) for path in folder.iterdir())
    return [(path, match[1], match[2], match[3]) for path, match in found if match is not None]


def _stem(name: str) -> str:
    """A name, or, for a long one, a short one that is unique to it."""
    content = os.fsencode(name)
    return name if len(content) <= LONGEST else f"{name[:10]}~{hashlib.sha256(content).hexdigest()[:16]}"
