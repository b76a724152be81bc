"""The published students of a store: STORE/registry/NAME/VERSION/, each a student folder that never changes.

The folders are authoritative. `_index.json` has the same content, for sources whose folders cannot be listed, such as
plain http. It is written after each publication, and again until it agrees with the folders. If several people publish
at the same time, the last one to write it has thus seen all versions.

A store may be shared by people who do not know each other. The permissions of its folder or server decide who may write
to it. Everything in it is untrusted until it is checked:

- Cards (distill.json) and entries of the index are validated by a schema. One that is invalid, not a file or too large
  is skipped with a warning; all others are used. Text is one line without control characters, numbers are finite,
  sizes are below 2^63 (student_card.py). File names are plain paths inside the folder with a few known suffixes. Links
  are not followed (manifest.py, core/regular_files.py). An entry of the index has at most 4 kB; if there are too many
  students, the index has only the newest.
- The content of a student is checked when it is pulled, verified or published, before it gets its final name. Size and
  sha256 of each file must match, and no other files may be there. Each file must have the format of its name, and must
  not lead a loader to other files, classes, weights or code (contents.py). Code must be identical to code that distill
  has shipped; other code is shown, and accepted only with --trust-code. In students with the network class of a stock
  pipeline, all files, and the classes that these name, must be among those of known pipelines, and only complete
  pipelines have code (stock_students.py).
- For data from a server, time, size and redirects are limited (transports.py, web.py, ssh.py, pulling.py). Its messages
  are printed as one short line.
- Files that only save time: image indexes (indexes/), costs of steps (schedules/), fitted solvers (fitted/) and
  measured rows of teachers (baselines/) are validated by a schema, all but the first also against the request; an
  invalid one is made again, or named. Fetched inputs (inputs/) must be complete; others are
  fetched again under another name. All are read as regular files of limited size.
- Text from others is escaped in model cards (core/markdown.py), and printed without control characters.

Not guaranteed:

- that a published student is good, is from its stated author, or has its stated licence;
- that a version stays: whoever may write to the folder may remove or replace it, so compare the sha256 that `students`
  shows;
- that README.md is what distill would write: it may contain any text and links;
- that an index over http is complete;
- that the numbers in an image index or in costs are right;
- that inputs/ has the same content as the hub: the first process that makes inputs/DIGEST decides the weights;
- that a store that someone fills up stays fast or has free space.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from distill.core import records
from distill.core.atomic import write_atomic
from distill.core.errors import InputError, RunError
from distill.core.field_types import NAME, Count, FrozenModel, Label, Line, Number
from distill.core.printing import warn
from distill.core.regular_files import read_regular
from distill.core.text import short, suggest
from distill.exchange import manifest, pulling, student_card
from distill.exchange.student_card import Digest, Metrics, StudentCard
from distill.exchange.transports import Missing, RemoteFolder, RemoteSource
from distill.spec.model import Name

REGISTRY, INDEX = "registry", "_index.json"
MAX_INDEX, MAX_ENTRIES = 64 << 20, 50_000  # bytes and entries of an index
# Bytes of an entry, number of its metrics, characters of the name of a metric.
MAX_ENTRY, MAX_METRICS, METRIC = 4096, 16, 100
MAX_OPENED, MAX_PARTS = 4 * MAX_ENTRIES, 60 * MAX_ENTRIES  # lists and objects in an index; its colons and commas
PIECE = 1 << 18  # bytes of an index that are scanned at once
ROUNDS = 100  # how often an index is rewritten because others publish at the same time


def _first_metrics(given: object) -> object:
    """The first `MAX_METRICS` metrics. Cards may have more, and older versions wrote all of them to the index."""
    if not isinstance(given, dict):
        return given
    return dict(islice(((name, value) for name, value in given.items() if len(str(name)) <= METRIC), MAX_METRICS))


class PublishedVersion(FrozenModel):
    """One published version of a student. Unknown fields, as of later versions of distill, are ignored."""

    model_config = ConfigDict(extra="ignore")

    name: Name
    version: Name
    digest: Digest
    """sha256 of its distill.json, which has those of all files"""
    size: Count
    """bytes of all files"""
    published: Annotated[Number, Field(ge=-1e11, le=1e11)]
    """unix seconds"""
    recipe: Line
    kind: Label
    license: Line
    metrics: Annotated[Metrics, BeforeValidator(_first_metrics)]
    """the first of its card's"""

    @property
    def label(self) -> str:
        return f"{self.name}:{self.version}"

    @property
    def order(self) -> tuple[float, list[tuple[int, str]]]:
        """Sort key: by time, then by version, with v10 after v9."""
        parts = re.findall(r"\d+|\D+", self.version)
        return self.published, [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


class PublishedIndex(FrozenModel):
    """The content of _index.json. Entries are validated one by one, so that an invalid one does not affect others."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[1] = 1
    students: Annotated[list[Any], Field(max_length=MAX_ENTRIES)]


@dataclass(frozen=True)
class Listed:
    """The published students of a store."""

    students: list[PublishedVersion]
    """sorted by name, the oldest version first"""
    skipped: list[str] = field(default_factory=list)
    """entries that cannot be used, each with the reason"""


def listed(source: RemoteSource, only: str = "*") -> Listed:
    """The published students of a store: from its folders if it is a local folder, else from its index.

    only: a name. In a local folder, students of other names are not read; an index is always read as a whole.
    Raises InputError if the store or its index cannot be read.
    """
    if isinstance(source, RemoteFolder):
        return scan(source.path, only)
    where = f"{source.where}/{REGISTRY}/{INDEX}"
    try:
        content = pulling.read(source.below(REGISTRY), INDEX, MAX_INDEX)
        if _fills_memory(content):
            raise InputError(f"{where} is too large: an index can have at most {MAX_ENTRIES:,} entries")
        given = PublishedIndex.model_validate_json(content).students
    except Missing as missing:
        raise InputError(f"{missing}; nothing has been published here, or this is not a store") from missing
    except ValidationError as error:
        raise InputError(f"{where} is not an index of students: {records.mistake(error)}") from error
    found = Listed([])
    for number, each in enumerate(given):
        try:
            found.students.append(PublishedVersion.model_validate(each))
        except ValidationError as error:
            found.skipped.append(f"entry {number + 1} of {where} is skipped: {records.mistake(error)}")
    return found


def _fills_memory(content: bytes) -> bool:
    """Whether JSON has too many values to be parsed safely, counted without parsing it."""
    plain = content.replace(rb"\\", b"").replace(rb"\"", b"")
    opened, parts, within = 0, 0, 0  # within: 1 inside a string
    for begin in range(0, len(plain), PIECE):
        pieces = plain[begin : begin + PIECE].split(b'"')
        outside = b" ".join(pieces[within::2])
        opened += outside.count(b"{") + outside.count(b"[")
        parts += outside.count(b":") + outside.count(b",")
        if opened > MAX_OPENED or parts > MAX_PARTS:
            return True
        within = (within + len(pieces) - 1) % 2
    return False


def scan(store: Path, only: str = "*") -> Listed:
    """The published students in the folder of a store. only: a name; "*": all."""
    found, registry = Listed([]), store / REGISTRY
    try:
        names = _folders(registry, found, only)
    except OSError as error:
        raise InputError(f"{registry} cannot be read: {error.strerror}") from error
    for name in names:
        try:
            versions = _folders(registry / name, found)
        except OSError as error:
            found.skipped.append(f"{registry / name} is skipped: {error.strerror}")
            continue
        for version in versions:
            try:
                entry = _entry(registry, name, version)
            except OSError as error:
                found.skipped.append(
                    f"{registry / name / version} is skipped: {student_card.FILE_NAME}: {error.strerror}"
                )
            except InputError as error:
                found.skipped.append(f"{registry / name / version} is skipped: {error}")
            else:
                found.students.extend([entry] if entry is not None else [])
    found.students.sort(key=lambda entry: (entry.name, entry.order))
    return found


def _folders(path: Path, found: Listed, only: str = "*") -> list[str]:
    """Sorted names of the folders in `path` that can be names or versions; empty if it does not exist.

    Links are added to `found.skipped`. only: a name; "*": all.
    """
    folders = []
    try:
        with os.scandir(path) as inside:
            for each in inside:
                if only not in ("*", each.name) or not NAME.fullmatch(each.name):
                    continue
                if each.is_symlink():
                    found.skipped.append(f"{path / each.name} is skipped: it is a link; links are not followed")
                elif each.is_dir(follow_symlinks=False):
                    folders.append(each.name)
    except FileNotFoundError:
        return []
    return sorted(folders)


def _entry(registry: Path, name: str, version: str) -> PublishedVersion | None:
    """The entry of a published version; None if it has no card. InputError if the card is invalid."""
    path = registry / name / version / student_card.FILE_NAME
    try:
        content, published = read_regular(path, student_card.MAX_CARD), path.stat().st_mtime
    except FileNotFoundError:
        return None
    return entry_of(name, version, manifest.parse(content, student_card.FILE_NAME), content, published)


def entry_of(name: str, version: str, card: StudentCard, content: bytes, published: float) -> PublishedVersion:
    """The entry of a student in the index. InputError if it is invalid or too large.

    content: content of its distill.json. published: unix seconds.
    """
    try:
        entry = PublishedVersion(
            name=name,
            version=version,
            digest=manifest.digest(content),
            size=sum(record.size for record in card.files.values()) + len(content),
            published=round(published, 3),
            recipe=card.recipe,
            kind=card.kind,
            license=card.license,
            metrics=card.metrics,
        )
    except ValidationError as error:
        raise InputError(records.mistake(error)) from error
    if (size := len(_line(entry))) > MAX_ENTRY:
        raise InputError(
            f"its entry in the index would take {size:,} bytes; valid: at most {MAX_ENTRY:,}. Shorten "
            f"recipe and license in {student_card.FILE_NAME}, or the names of its metrics"
        )
    return entry


def write_index(store: Path) -> Listed:
    """Write `_index.json` from the folders, and return all published students.

    If there are too many students, the index has only the newest, and a warning is printed. Raises RunError if it
    cannot be written.
    """
    found = scan(store)
    for _ in range(ROUNDS):
        content = _bytes(found.students)
        try:
            write_atomic(store / REGISTRY / INDEX, content)
        except RunError as error:
            raise RunError(
                f"the student is published, but users who read this store over http cannot see it: {error}. Make "
                "that file writable, then publish the student again"
            ) from error
        found = scan(store)
        if _bytes(found.students) == content:
            break
    if left_out := len(found.students) - content.count(b"\n{"):
        warn(
            f"{store / REGISTRY / INDEX} is full: the oldest {left_out:,} of {len(found.students):,} students are not "
            "in it; over http they can be pulled only by NAME:VERSION"
        )
    return found


def _bytes(students: Sequence[PublishedVersion]) -> bytes:
    """The content of the index, one line per student; the newest students if there are too many."""
    head, end = b'{"format": 1, "students": [', b"\n]}\n"
    lines, size = dict[int, bytes](), len(head) + len(end)
    newest = sorted(range(len(students)), key=lambda place: students[place].published, reverse=True)
    for place in newest[:MAX_ENTRIES]:
        lines[place] = b"\n" + _line(students[place])
        size += len(lines[place]) + 1
        if size > MAX_INDEX:
            del lines[place]
            break
    return head + b",".join(lines[place] for place in sorted(lines)) + end


def _line(entry: PublishedVersion) -> bytes:
    return json.dumps(entry.model_dump(mode="json"), ensure_ascii=False, allow_nan=False).encode()


def split(given: str) -> tuple[str, str | None]:
    """Split NAME[:VERSION] into (name, version or None). InputError if it is malformed."""
    name, colon, version = given.partition(":")
    plain = short(re.sub(".*:.*@", "...@", given, flags=re.DOTALL))  # it may be a URL with a password
    for word, text in (("name", name), ("version", version)):
        if (word == "name" or colon) and not NAME.fullmatch(text):
            raise InputError(
                f"'{plain}': NAME or NAME:VERSION is expected; a {word} consists of 1 to 64 letters, digits, "
                "'.', '_' or '-' and begins with a letter or digit"
            )
    return name, version if colon else None


def locate(source: RemoteSource, listed: Listed, name: str, version: str | None) -> tuple[RemoteSource, str | None]:
    """(folder, digest) of a published version; version None: the newest.

    If the index lacks the version, its folder is returned with the digest None, since the index may be older. Raises
    InputError if a local store lacks the version, or if none is given and the store has no student of this name.
    """
    found = [entry for entry in listed.students if entry.name == name]
    if version is None and found:
        version = max(found, key=lambda entry: entry.order).version
    digest = next((entry.digest for entry in found if entry.version == version), None)
    if version is None or (digest is None and isinstance(source, RemoteFolder)):
        raise InputError(_absent(source, listed, name, version, found))
    return source.below(REGISTRY).below(name).below(version), digest


def _absent(
    source: RemoteSource, listed: Listed, name: str, version: str | None, versions: list[PublishedVersion]
) -> str:
    for place, _, why in (each.partition(" is skipped: ") for each in listed.skipped):
        if isinstance(source, RemoteFolder) and (version is None or place.endswith((f"/{name}", f"/{name}/{version}"))):
            return f"{place} cannot be used: {why}"
    if versions and version is not None:
        return f"'{name}' has no version '{version}'; {suggest(version, [entry.version for entry in versions])}"
    if isinstance(source, RemoteFolder):
        names = set(_folders(source.path / REGISTRY, Listed([])))
    else:
        names = {entry.name for entry in listed.students}
    hint = suggest(name, names) if names else "nothing was published there yet: distill publish RUN NAME"
    return f"{source.where} has no published student '{name}'; {hint}"
