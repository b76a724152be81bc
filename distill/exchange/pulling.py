"""Pulls a student into a folder: its distill.json is checked first, then all files are fetched into a hidden folder
next to the destination, checked, and renamed.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR

from distill.core import space
from distill.core.atomic import is_abandoned, sync, sync_tree, write_atomic
from distill.core.errors import InputError, RunError
from distill.core.owners import Owner
from distill.core.regular_files import read_regular
from distill.exchange import contents, manifest, student_card
from distill.exchange.student_card import StudentCard
from distill.exchange.transfer import PAUSES, Tally, fetch
from distill.exchange.transports import Broken, Missing, Refused, RemoteFolder, RemoteSource
from distill.runs.progress import Progress

SMALL, RATE = 60.0, 64 << 10  # time limit of a small file: seconds, and the bytes that allow one more second

Show = Callable[[str, str], None]  # gets the file name and the text of unknown code


@dataclass(frozen=True)
class Pulled:
    """The result of a pull."""

    card: StudentCard
    digest: str
    fetched: int
    """bytes that were fetched; 0: the student was already there"""


def read(source: RemoteSource, name: str, limit: int) -> bytes:
    """The content of a small file.

    Raises Missing if there is none, InputError if it is refused or has more than `limit` bytes, and RunError if the
    source fails or is too slow. The time limit, with retries, is a minute plus a second for each RATE bytes received.
    """
    failures, begin = 0, time.monotonic()
    while True:
        content = bytearray()
        try:
            with source.open(name, 0) as stream:
                while block := stream.read(limit + 1 - len(content)):
                    content += block
                    if len(content) > limit:
                        raise InputError(f"{source.where}: {name} is larger than the limit of {limit:,} bytes")
                    if _is_late(begin, len(content)):
                        raise RunError(
                            f"{source.where} is too slow: {len(content):,} bytes of {name} in more than {SMALL:.0f} s; "
                            "try again later"
                        )
            return bytes(content)
        except Broken as broken:
            failures += 1
            if failures > source.retries or _is_late(begin, len(content)):
                raise RunError(f"{source.where} cannot be read: {broken}; try again later") from broken
            Tally().stop.wait(PAUSES[min(failures, len(PAUSES)) - 1])
        except Missing:
            raise
        except Refused as refused:
            raise InputError(str(refused)) from refused


def _is_late(begin: float, size: int) -> bool:
    return time.monotonic() - begin > SMALL + size / RATE


def describe(source: RemoteSource) -> tuple[StudentCard, bytes]:
    """(card, content of distill.json) of the student at a source.

    Raises InputError if it is not a student folder, the card is invalid, or there are files that it does not list.
    """
    try:
        content = read(source, student_card.FILE_NAME, student_card.MAX_CARD)
    except Missing as missing:
        raise InputError(
            f"{source.where} is not a student folder: it has no {student_card.FILE_NAME} ({missing})"
        ) from missing
    card = manifest.parse(content, f"{source.where}/{student_card.FILE_NAME}")
    found = source.listing()
    if found is not None:
        student_card.refuse_strange(found, card, source.where)
    return card, content


def verify(folder: Path, show: Show | None = None) -> StudentCard:
    """Check a student folder completely, and return its card. InputError if a check fails.

    show: called with each file of unknown code; None: unknown code is refused.
    """
    card, _ = describe(RemoteFolder(folder))
    if show is None:
        manifest.refuse_unknown_code(card, str(folder))
    student_card.verify(folder)
    contents.refuse(folder, card)
    _show(folder, card, show)
    return card


def pull(source: RemoteSource, dest: Path, *, digest: str | None = None, show: Show | None = None) -> Pulled:
    """Fetch the student at `source` to the folder `dest`, which appears only when it is complete and checked.

    digest: the expected digest, if known. show: called with each file of unknown code; None: unknown code is refused.
    Raises InputError if the student is refused or `dest` is something else, and RunError if the transfer fails.
    """
    dest = dest.absolute()
    card, content = describe(source)
    found = manifest.digest(content)
    if digest is not None and digest != found:
        raise InputError(
            f"{source.where} is not the student in the store's index (sha256 {found[:12]}, expected {digest[:12]}); "
            "published versions never change, so ask the owner of the store"
        )
    if show is None:
        manifest.refuse_unknown_code(card, source.where)
    if _is_here(dest, content, show):
        return Pulled(card, found, 0)
    size = sum(record.size for record in card.files.values())
    try:
        with workplace(dest, found) as here:
            held = sum(path.stat().st_size for path in here.rglob("*") if path.is_file())
            space.require(dest.parent, size - held, f"the files of {source.where}")
            fetch_all(source, card, here)
            try:
                contents.refuse(here, card)
            except InputError:
                shutil.rmtree(here)  # nothing that was refused is kept
                raise
            _show(here, card, show)
            _settle(here, dest, card, content)
    except OSError as error:
        raise RunError(f"cannot write {dest}: {error.strerror}; nothing was changed there") from error
    return Pulled(card, found, size)


def _is_here(dest: Path, content: bytes, show: Show | None) -> bool:
    """Whether `dest` already is this student. InputError if it is anything else or damaged."""
    if not dest.exists() and not dest.is_symlink():
        return False
    try:
        here = read_regular(dest / student_card.FILE_NAME, student_card.MAX_CARD)
    except OSError as error:
        raise InputError(f"{dest} exists and is not a student; name another folder") from error
    if here != content:
        raise InputError(f"{dest} contains another student; name another folder, or remove it")
    verify(dest, show)
    return True


def fetch_all(source: RemoteSource, card: StudentCard, here: Path, label: str = "pull") -> None:
    """Fetch all listed files into the folder `here`, several at once, the largest first."""
    files = sorted(card.files.items(), key=lambda item: -item[1].size)
    total, tally = sum(record.size for _, record in files), Tally()
    with Progress(label, total // 1000, "kB", None) as progress, ThreadPoolExecutor(source.parallel) as pool:
        waiting = {pool.submit(fetch, source, name, record, here / name, tally) for name, record in files}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                for each in done:
                    each.result()
                progress.update(tally.bytes // 1000, {})
        finally:
            tally.stop.set()
            pool.shutdown(cancel_futures=True)


def _show(folder: Path, card: StudentCard, show: Show | None) -> None:
    if show is not None:
        for name in manifest.unknown_code(card):
            show(name, (folder / name).read_text())


@contextmanager
def workplace(dest: Path, digest: str) -> Iterator[Path]:
    """A hidden folder next to `dest` for this process alone. It has the files of an earlier, unfinished pull, if any.

    Its name contains the label of its process. The folder of a dead process is taken over by renaming it, which
    succeeds only once. `atomic.new_folder` is not used, since it starts with an empty folder.
    """
    free = dest.with_name(f".{dest.name}.part-{digest[:16]}")
    mine = free.with_name(f"{free.name}.{Owner.this().label}")
    dest.parent.mkdir(parents=True, exist_ok=True)
    for left in sorted(dest.parent.iterdir()):
        with suppress(OSError):  # another process took it over first
            if left.name.startswith(free.name) and _is_left(left, free):
                left.rename(mine)
                break
    mine.mkdir(exist_ok=True)
    if not _is_own(mine):
        raise RunError(f"{mine} belongs to another user; remove it, or give another folder")
    try:
        yield mine
    finally:
        if mine.exists():
            with suppress(OSError):  # another pull has left a folder of this name
                mine.rename(free)


def _is_left(path: Path, free: Path) -> bool:
    """Whether this user owns the folder and its process is dead, or on another host and silent for long."""
    label = path.name.removeprefix(f"{free.name}.")
    return (path == free or (Owner.of_label(label) is not None and is_abandoned(path, label))) and _is_own(path)


def _is_own(path: Path) -> bool:
    """Whether it is a folder that this user owns, and not a link."""
    state = path.lstat()
    return S_ISDIR(state.st_mode) and state.st_uid == os.geteuid()


def _settle(here: Path, dest: Path, card: StudentCard, content: bytes) -> None:
    """Rename a complete student to `dest`. If another pull has put the same student there first, that one is kept."""
    for name in RemoteFolder(here).listing() or []:
        if name not in card.files:  # left by a killed process
            (here / name).unlink()
    write_atomic(here / student_card.FILE_NAME, content)
    sync_tree(here)
    try:
        here.rename(dest)
    except OSError:
        if not _is_here(dest, content, lambda name, text: None):
            raise
        shutil.rmtree(here)
    sync(dest.parent)
