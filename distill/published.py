"""The published students of a store: STORE/registry/NAME/VERSION/, each a student folder that never changes.

The folders are the truth. `_index.json` beside them says the same where folders cannot be listed, as over plain http.
It is written after each publication, and written again until it says what the folders say; so whoever of several
publishers is the last to write it has seen the versions of all.

A store is shared by people who do not know each other. Who may write there is a matter of its folder's permissions, or
of whoever keeps the server; everything in it is taken to come from somebody hostile, until it is checked:

- A card (distill.json) or an entry of the index, by schema: one that is broken, no plain file, or too large is skipped,
  with a warning that names it, and all others go on. Texts are single lines without control characters, numbers finite,
  sizes below 2^63 (card.py). File names are plain, below the folder, and of few kinds; links are not followed
  (manifest.py, regular.py).
- What a student holds, when it is pulled, verified or published, before it has its name: size and sha256 of each file,
  no file that is not listed, each of the kind that its name says, nothing that leads a loader to other files, classes,
  weights or code (contents.py). Code must be, byte for byte, what distill has shipped, or is shown and taken on trust.
- What the other side of a connection says: time, size and redirections are limited (transports.py, web.py, ssh.py,
  pull.py), and it is printed as one short line.
- What saves time beside them. An index of images (indexes/) or the costs of steps (schedules/), by schema, the
  latter also by what was asked for: what does not fit is made again. Of what was fetched (inputs/), that it is there:
  what is not is fetched again, under another name. All are read as plain files of bounded size.
- Foreign text in a model card is plain text there (markdown.py), and in a terminal it is without control characters.

Not promised: that a published student is good, is by whom it says, or has the licence it names; that a version stays
(whoever may write in the folder may also remove or replace it: the sha256 that `students` shows tells one from the
other); that an index over http is complete; that the numbers of an index of images or of costs are right; that inputs/
holds what the hub has (whoever makes inputs/DIGEST first decides the weights); that a store which somebody fills up
stays quick, or has room.
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from distill import card as cards
from distill import manifest, pull
from distill.card import Count, Digest, Label, Line, Metrics, Number
from distill.guard import InputError, RunError, short, suggest
from distill.regular import read_regular
from distill.spec import Frozen, Name
from distill.store import write_atomic
from distill.transports import Folder, Missing, Source

REGISTRY, INDEX = "registry", "_index.json"
MAX_INDEX, MAX_ENTRIES = 64 << 20, 200_000  # bytes and entries of an index
ROUNDS = 100  # times that an index is written anew because others publish too
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Entry(Frozen):
    """One version of a student. What later versions of distill may add is ignored."""

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
    metrics: Metrics

    @property
    def label(self) -> str:
        return f"{self.name}:{self.version}"

    @property
    def order(self) -> tuple[float, list[tuple[int, str]]]:
        """By time; then v10 after v9."""
        parts = re.findall(r"\d+|\D+", self.version)
        return self.published, [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


class Index(Frozen):
    """The content of _index.json."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[1] = 1
    students: Annotated[list[Entry], Field(max_length=MAX_ENTRIES, fail_fast=True)]


class Unchecked(Frozen):
    """An index whose entries are to be looked at one by one."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[1] = 1
    students: Annotated[list[Any], Field(max_length=MAX_ENTRIES)]


@dataclass(frozen=True)
class Listed:
    """What a store has published."""

    students: list[Entry]
    """by name, the oldest version first"""
    skipped: list[str] = field(default_factory=list)
    """what cannot be used, each with the reason"""


def entries(source: Source) -> list[Entry]:
    """The students of `listed`."""
    return listed(source).students


def listed(source: Source, only: str = "*") -> Listed:
    """All that a store has published, by its folders, or by its index where it is no folder.

    only: a name; of a folder's students, those of other names are not looked at.
    """
    if isinstance(source, Folder):
        return scan(source.path, only)
    where = f"{source.where}/{REGISTRY}/{INDEX}"
    try:
        content = pull.read(source.below(REGISTRY), INDEX, MAX_INDEX)
        # Parsed, what has very many objects, lists or keys would fill the memory.
        if content.count(b"{") + content.count(b"[") > 4 * MAX_ENTRIES or content.count(b":") > 16 * MAX_ENTRIES:
            raise InputError(f"{where} holds more than an index of {MAX_ENTRIES:,} entries would; it is refused")
        return Listed(Index.model_validate_json(content).students)
    except Missing as missing:
        raise InputError(f"{missing}; nothing was published in this store, or it is none") from missing
    except ValidationError:
        return _one_by_one(content, where)


def _one_by_one(content: bytes, where: str) -> Listed:
    """What is in order of an index that as a whole is not."""
    try:
        given = Unchecked.model_validate_json(content).students
    except ValidationError as error:
        raise InputError(f"{where} is no index of students: {cards.reason(error)}") from error
    found = Listed([])
    for number, each in enumerate(given):
        try:
            found.students.append(Entry.model_validate(each))
        except ValidationError as error:
            found.skipped.append(f"entry {number + 1} of {where} is skipped: {cards.reason(error)}")
    return found


def scan(store: Path, only: str = "*") -> Listed:
    """The versions that lie in a store's folder, of one name or of all."""
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
                found.skipped.append(f"{registry / name / version} is skipped: {cards.FILE_NAME}: {error.strerror}")
            except InputError as error:
                found.skipped.append(f"{registry / name / version} is skipped: {error}")
            else:
                found.students.extend([entry] if entry is not None else [])
    found.students.sort(key=lambda entry: (entry.name, entry.order))
    return found


def _folders(path: Path, found: Listed, only: str = "*") -> list[str]:
    """The folders in a folder that may be names or versions, all or one; none where it does not exist."""
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


def _entry(registry: Path, name: str, version: str) -> Entry | None:
    """None: there is no card, or no longer."""
    path = registry / name / version / cards.FILE_NAME
    try:
        content, published = read_regular(path, cards.MAX_CARD), path.stat().st_mtime
    except FileNotFoundError:
        return None
    card = manifest.parse(content, cards.FILE_NAME)
    try:
        return Entry(
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
        raise InputError(cards.reason(error)) from error


def write_index(store: Path) -> Listed:
    """Let `_index.json` say what the folders say: which is returned."""
    found = scan(store)
    for _ in range(ROUNDS):
        content = _bytes(found)
        try:
            write_atomic(store / REGISTRY / INDEX, content)
        except RunError as error:
            raise RunError(
                f"the student is published, but whoever reads this store over http does not see it: {error}. Once "
                "that file can be written, publish the student again"
            ) from error
        found = scan(store)
        if _bytes(found) == content:
            break
    return found


def _bytes(found: Listed) -> bytes:
    """The content of the index."""
    content = Index(students=found.students[-MAX_ENTRIES:]).model_dump(mode="json")
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def split(given: str) -> tuple[str, str | None]:
    """NAME[:VERSION]; InputError if it cannot be one."""
    name, colon, version = given.partition(":")
    plain = short(re.sub(".*:.*@", "...@", given, flags=re.DOTALL))  # it may be an address with a password
    for word, text in (("name", name), ("version", version)):
        if (word == "name" or colon) and not NAME.fullmatch(text):
            raise InputError(
                f"'{plain}': NAME or NAME:VERSION is expected; a {word} is letters, digits, '.', '_' and '-', begins "
                "with a letter or digit, and has at most 64"
            )
    return name, version if colon else None


def locate(source: Source, listed: Listed, name: str, version: str | None) -> tuple[Source, str | None]:
    """The folder of a version of a name, or of its newest, and its digest.

    A version that the index does not have is looked for in its place: who published it may not have come to that.
    """
    found = [entry for entry in listed.students if entry.name == name]
    if version is None and found:
        version = max(found, key=lambda entry: entry.order).version
    digest = next((entry.digest for entry in found if entry.version == version), None)
    if version is None or (digest is None and isinstance(source, Folder)):
        raise InputError(_absent(source, listed, name, version, found))
    return source.below(REGISTRY).below(name).below(version), digest


def _absent(source: Source, listed: Listed, name: str, version: str | None, versions: list[Entry]) -> str:
    for place, _, why in (each.partition(" is skipped: ") for each in listed.skipped):
        if isinstance(source, Folder) and (version is None or place.endswith((f"/{name}", f"/{name}/{version}"))):
            return f"{place} cannot be used: {why}"
    if versions and version is not None:
        return f"'{name}' has no version '{version}'; {suggest(version, [entry.version for entry in versions])}"
    if isinstance(source, Folder):
        names = set(_folders(source.path / REGISTRY, Listed([])))
    else:
        names = {entry.name for entry in listed.students}
    hint = suggest(name, names) if names else "nothing was published there yet: distill publish RUN NAME"
    return f"{source.where} has no published student '{name}'; {hint}"
