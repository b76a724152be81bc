"""The published students of a store: STORE/registry/NAME/VERSION/, each a student folder that never changes.

The folders are the truth. `_index.json` beside them says the same where folders cannot be listed, as over plain http.
It is written after each publication, and written again until it says what the folders say; so whoever of several
publishers is the last to write it has seen the versions of all.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from distill import card as cards
from distill import manifest, pull
from distill.guard import InputError, suggest
from distill.spec import Frozen, Name
from distill.store import write_json
from distill.transports import Folder, Missing, Source

REGISTRY, INDEX, MAX_INDEX = "registry", "_index.json", 64 << 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Entry(Frozen):
    """One version of a student."""

    name: Name
    version: Name
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """sha256 of its distill.json, which has those of all files"""
    size: int
    """bytes of all files"""
    published: float
    """unix seconds"""
    recipe: str
    kind: str
    license: str
    metrics: dict[str, float]

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

    format: Literal[1] = 1
    students: list[Entry]


def entries(source: Source) -> list[Entry]:
    """All that a store has published, by name, the oldest version first."""
    if isinstance(source, Folder):
        return sorted(scan(source.path), key=lambda entry: (entry.name, entry.order))
    where = f"{source.where}/{REGISTRY}/{INDEX}"
    try:
        content = pull.read(source.below(REGISTRY), INDEX, MAX_INDEX)
        return Index.model_validate_json(content).students
    except Missing as missing:
        raise InputError(f"{missing}; nothing was published in this store, or it is none") from missing
    except ValidationError as error:
        raise InputError(f"{where} is no index of students: {error.errors()[0]['msg']}") from error


def scan(store: Path) -> Iterator[Entry]:
    """The versions that lie in a store's folder."""
    for path in sorted((store / REGISTRY).glob(f"*/*/{cards.FILE_NAME}")):
        version, name = path.parent.name, path.parent.parent.name
        if NAME.fullmatch(name) and NAME.fullmatch(version):
            try:
                content, published = path.read_bytes(), path.stat().st_mtime
            except FileNotFoundError:  # removed a moment ago
                continue
            card = cards.parse(content, str(path))
            yield Entry(
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


def write_index(store: Path) -> None:
    """Let `_index.json` say what the folders say."""
    while True:
        found = entries(Folder(store))
        write_json(store / REGISTRY / INDEX, Index(students=found).model_dump(mode="json"))
        if entries(Folder(store)) == found:
            return


def split(given: str) -> tuple[str, str | None]:
    """NAME[:VERSION]; InputError if it cannot be one."""
    name, colon, version = given.partition(":")
    for word, text in (("name", name), ("version", version)):
        if (word == "name" or colon) and not NAME.fullmatch(text):
            raise InputError(
                f"'{given}': NAME or NAME:VERSION is expected; a {word} is letters, digits, '.', '_' and '-', begins "
                "with a letter or digit, and has at most 64"
            )
    return name, version if colon else None


def locate(source: Source, name: str, version: str | None) -> tuple[Source, str | None]:
    """The folder of a version of a name, or of its newest, and its digest.

    A version that the index does not have is looked for in its place: who published it may not have come to that.
    """
    found = [entry for entry in entries(source) if entry.name == name]
    if version is None and found:
        version = max(found, key=lambda entry: entry.order).version
    digest = next((entry.digest for entry in found if entry.version == version), None)
    if version is None or (digest is None and isinstance(source, Folder)):
        raise InputError(_absent(source, name, version, found))
    return source.below(REGISTRY).below(name).below(version), digest


def _absent(source: Source, name: str, version: str | None, versions: list[Entry]) -> str:
    if versions and version is not None:
        return f"'{name}' has no version '{version}'; {suggest(version, [entry.version for entry in versions])}"
    names = {entry.name for entry in entries(source)}
    hint = suggest(name, names) if names else "nothing was published there yet: distill publish RUN NAME"
    return f"{source.where} has no published student '{name}'; {hint}"
