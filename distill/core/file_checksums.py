"""SHA-256 checksums of files. Those of large files are kept, so that not every process of a run reads the whole file.

They are kept in STORE/indexes for later runs and in RUN/indexes for the ranks and stages of one run, and can be deleted
at any time. A file whose size and timestamps have not changed is not read again. Other users may have written the
checksums of a store, so they are validated, and invalid ones are ignored.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from distill.core.atomic import write_atomic
from distill.core.errors import RunError
from distill.core.field_types import FrozenModel
from distill.core.printing import say_error, warn
from distill.core.regular_files import open_regular, read_regular
from distill.core.text import printable

FILE = "indexes/checksums.json"  # below a store or a run
MAX_BYTES = 2**24  # maximum size of this file
LARGE = 2**26  # bytes; checksums of files from this size on are kept
LONG = 2**32  # bytes; a note says that the checksum takes a while
GIGABYTE = 10**9
SETTLED = 2 * 10**9  # nanoseconds; a file may have been modified again within the resolution of its timestamp


class KnownChecksum(FrozenModel):
    """The checksum of a file in one state."""

    path: str
    bytes: int
    modified: int
    """mtime in nanoseconds since 1970"""
    changed: int
    """ctime in nanoseconds since 1970"""
    found: int
    """when the file was read, in nanoseconds since 1970"""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    def is_of(self, path: str, state: os.stat_result) -> bool:
        same = (self.path, self.bytes, self.modified, self.changed) == (path, *_times(state))
        return same and self.modified < self.found - SETTLED


_CHECKSUMS = TypeAdapter(list[KnownChecksum])
_KNOWN: dict[str, KnownChecksum] = {}  # by path; of large files


def sha256(path: Path) -> str:
    """The checksum of a file: the one that is known, or the file is read. Raises OSError if it cannot be read."""
    name, state = os.path.realpath(path), path.stat()
    known = _KNOWN.get(name)
    if known is not None and known.is_of(name, state):
        return known.sha256
    if state.st_size >= LONG:
        say_error(
            f"checksum of {printable(str(path))} ({state.st_size // GIGABYTE} GB): this takes a while, but only once"
        )
    now = time.time_ns()
    with open_regular(path, follow=True) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        state = os.fstat(file.fileno())
    if state.st_size >= LARGE:
        size, modified, changed = _times(state)
        _KNOWN[name] = KnownChecksum(
            path=name, bytes=size, modified=modified, changed=changed, found=now, sha256=digest
        )
    return digest


def read(folder: Path) -> None:
    """Takes over the checksums that a store or a run has kept."""
    try:
        found = _CHECKSUMS.validate_json(read_regular(folder / FILE, MAX_BYTES))
    except (OSError, ValidationError):
        return
    for each in found:
        if each.path not in _KNOWN or _KNOWN[each.path].found < each.found:
            _KNOWN[each.path] = each


def keep(paths: Sequence[Path], store: Path | None, run: Path | None = None) -> None:
    """Adds the checksums of those files that are large to those that a store and a run have kept.

    Raises OSError if a file cannot be read, and RunError if the checksums cannot be written to the run. If the store
    cannot be written, for example because it belongs to another user, there is only a warning.
    """
    large = [path for path in paths if path.stat().st_size >= LARGE]
    if not large:
        return
    for folder in (store, run):
        if folder is not None:
            read(folder)
    for path in large:
        sha256(path)
    if store is not None:
        try:
            _add(large, store)
        except RunError as error:
            warn(f"{error}; without the checksums in the store, each new run reads these files again")
    if run is not None:
        _add(large, run)


def _add(large: Sequence[Path], folder: Path) -> None:
    """Adds the checksums of files to those that a store or a run has kept. Raises RunError if it cannot be written."""
    try:
        kept = {each.path: each for each in _CHECKSUMS.validate_json(read_regular(folder / FILE, MAX_BYTES))}
    except (OSError, ValidationError):
        kept = {}
    new = kept | {name: _KNOWN[name] for name in map(os.path.realpath, large)}
    if new == kept:
        return
    try:
        (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create {(folder / FILE).parent}: {error.strerror}; nothing was changed") from error
    write_atomic(folder / FILE, _CHECKSUMS.dump_json(list(new.values())))


def _times(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns
