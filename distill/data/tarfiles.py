"""Finds the samples of one tar of a WebDataset, from its headers.

A sample is a group of consecutive members with the same key: their path up to the first dot of the file name. Nothing
is extracted: images are read later, at their offsets. Links, devices and sparse files are never followed.
"""

import io
import json
import os
import re
import tarfile
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.core.errors import InputError
from distill.core.regular_files import open_regular
from distill.core.text import printable, whole_number
from distill.data.facts import State
from distill.data.prompts import CaptionFault, StoredCaption, cleaned
from distill.data.rows import FileNames
from distill.spec.imagefolder import MAX_CLASSES, suffixes

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER = 2**20  # bytes of a long name or of the extended headers of one member
MAX_TEXT = 2**20  # bytes of a caption, a class id, or the fields of a sample
MAX_LABEL = 100  # bytes of a class id
MAX_TAIL = 2**16  # bytes after the end of a tar that are checked to be zeros
KEY = re.compile(rb"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)  # key and ending, like 000/0001 and jpg
COMPRESSED = {  # first bytes -> (name, how to decompress the file)
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
# What tarfile raises for headers that are not valid.
INVALID = (tarfile.TarError, ValueError, OverflowError, RecursionError, IndexError, KeyError)


@dataclass(frozen=True)
class SampleKeys:
    """What is read from each sample, apart from its image."""

    caption: str | None
    """`txt`, or the name of a field in `json`; None: there are no captions"""
    label: str | None
    """`cls`, or the name of a field in `json`; None: there are no classes"""
    from_json: bool

    @classmethod
    def of(cls, caption_key: str | None, label_key: str | None) -> "SampleKeys":
        """Parse the keys of a spec: txt, cls, or json.FIELD."""
        kind, _, name = (caption_key or label_key or "").partition(".")
        caption = None if caption_key is None else name or kind
        return cls(caption, None if label_key is None else name or kind, kind == "json")

    @property
    def ending(self) -> str | None:
        """The ending of the file that is read."""
        return "json" if self.from_json else self.caption or self.label


@dataclass(frozen=True)
class TarContent:
    """The N samples of a tar, in their order. The last row may stand for damage to the tar itself."""

    file: tuple[int, int, int]
    """size of the tar in bytes, mtime and ctime in ns since 1970"""
    names: FileNames
    """file name of each image in the tar, or the key of a sample that cannot be used; empty: damage to the tar"""
    members: NDArray[np.int64]
    """[N, 2]: offset and size of each image in bytes"""
    state: NDArray[np.uint8]
    """[N]: values of State; FINE: not checked yet"""
    labels: NDArray[np.int64]
    """[N]: class ids; 0 if there are none"""
    captions: list[StoredCaption]
    """[N] as stored in the tar, or why there is none; empty if captions are not used"""


@dataclass
class _Sample:
    key: bytes
    name: bytes = b""
    place: tuple[int, int] = (0, 0)
    images: int = 0
    linked: bool = False
    content: bytes | None = None
    """of the file with the ending `SampleKeys.ending`"""
    state: State = State.FINE


class _Headers(io.BufferedReader):
    """A tar whose headers are read. It limits the size of a header, which tarfile reads into memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError("a header is too large")
        return super().read(size)


@dataclass
class _Rows:
    """The rows found so far."""

    keys: SampleKeys
    names: list[bytes] = field(default_factory=list)
    members: "array[int]" = field(default_factory=lambda: array("q"))  # offset, size, offset ...
    states: "array[int]" = field(default_factory=lambda: array("B"))
    labels: "array[int]" = field(default_factory=lambda: array("q"))
    hashes: "array[int]" = field(default_factory=lambda: array("q"))  # of the keys
    captions: list[StoredCaption] = field(default_factory=list)

    def add(self, sample: _Sample) -> None:
        state, label, caption = _checked(sample, self.keys)
        self.names.append(sample.name if state is State.FINE else sample.key)
        self.members.extend(sample.place)
        self.states.append(state)
        self.labels.append(label)
        self.hashes.append(hash(sample.key))
        if self.keys.caption is not None:
            self.captions.append(caption)

    def content(self, found: os.stat_result) -> TarContent:
        state = np.array(self.states, np.uint8)
        _, numbers, counts = np.unique(np.array(self.hashes, np.int64), return_inverse=True, return_counts=True)
        repeated = (counts[numbers] > 1) & (state < State.CUT)
        state[repeated] = State.REPEATED
        for row in np.flatnonzero(repeated).tolist():
            self.labels[row] = 0
            if self.captions:
                self.captions[row] = None
        return TarContent(
            (found.st_size, found.st_mtime_ns, found.st_ctime_ns),
            FileNames.of(self.names),
            np.array(self.members, np.int64).reshape(-1, 2),
            state,
            np.array(self.labels, np.int64),
            self.captions,
        )


def scan(path: Path, keys: SampleKeys) -> TarContent:
    """Reads the headers of a tar, and its captions or class ids.

    Raises InputError if it is compressed, and OSError if it cannot be read. Other damage is a row of the result.
    """
    with open_regular(path, follow=True) as raw, _Headers(raw) as file:
        found = os.fstat(file.fileno())
        _refuse_compressed(path, file.peek(8)[:8])
        rows = _Rows(keys)
        damage = _read(file, found.st_size, rows)
        if damage is None and not rows.names:
            damage = State.NO_SAMPLES
        if damage is not None:
            rows.add(_Sample(b"", state=damage))
        return rows.content(found)


def _refuse_compressed(path: Path, begin: bytes) -> None:
    for magic, (name, command) in COMPRESSED.items():
        if begin.startswith(magic):
            raise InputError(
                f"data.path: {printable(str(path))} is compressed with {name}, so its images cannot be read in random "
                f"order; decompress it with `{command}`, and give the .tar file"
            )


def _read(file: _Headers, size: int, rows: _Rows) -> State | None:
    """Adds the complete samples of a tar of `size` bytes to rows. Returns what is wrong with the tar, if anything."""
    sample: _Sample | None = None
    end, damage = 0, None
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        while damage is None and (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # they would all be kept
            if member.offset < end or member.size < 0:
                damage = State.BAD_HEADER
            elif member.offset_data + (member.size if member.isreg() else 0) > size:
                damage = State.CUT
            else:
                end = member.offset_data
                sample = _added(sample, member, file, rows)
        damage = damage or _after(file, tar.offset, size)
    except INVALID:
        is_cut = not size or (sample is not None and (size % BLOCK or file.tell() >= size))
        damage = State.CUT if is_cut else State.BAD_HEADER
    if sample is not None and (damage is None or _is_complete(sample, rows.keys)):
        rows.add(sample)  # in a damaged tar, files of the last sample may be missing
    return damage


def _is_complete(sample: _Sample, keys: SampleKeys) -> bool:
    state, _, caption = _checked(sample, keys)
    return state is State.FINE and (keys.caption is None or not isinstance(cleaned(caption), CaptionFault))


def _added(sample: _Sample | None, member: tarfile.TarInfo, file: _Headers, rows: _Rows) -> _Sample | None:
    """Adds a member to its sample, which is returned. If another sample begins, the one before is added to rows."""
    name = os.fsencode(member.name).removeprefix(b"./")
    match = KEY.fullmatch(name)
    if match is None or member.isdir():
        return sample
    key, ending = match[1], os.fsdecode(match[2]).lower()
    is_image = f".{ending}" in suffixes()
    if sample is None or sample.key != key:
        if sample is not None:
            rows.add(sample)
        sample = _Sample(key)
    if not is_image and ending != rows.keys.ending:
        return sample
    if not (member.isreg() and member.sparse is None):
        sample.state = State.LINK
    elif is_image:
        sample.images += 1
        sample.name, sample.place = name, (member.offset_data, member.size)
    elif sample.content is not None:
        sample.state = State.REPEATED
    else:
        file.seek(member.offset_data)
        sample.content = file.read(min(member.size, MAX_TEXT + 1))
    return sample


def _after(file: _Headers, offset: int, size: int) -> State | None:
    """Checks what follows the last member: two blocks of zeros, and only zeros after them."""
    file.seek(offset)
    rest = file.read(min(MAX_TAIL, max(0, size - offset)))
    if len(rest) < BLOCK:
        return State.CUT
    return State.BAD_HEADER if rest.strip(b"\0") else None


def _checked(sample: _Sample, keys: SampleKeys) -> tuple[State, int, bytes | str | None]:
    """(state, class id, caption) of a sample; 0 and None if there is none."""
    if sample.state is not State.FINE:
        return sample.state, 0, None
    if sample.images != 1:
        return State.SEVERAL_IMAGES if sample.images else State.NO_IMAGE, 0, None
    content = sample.content
    if keys.from_json:
        value = _field(content, keys.caption or keys.label or "")
    elif keys.label is not None and content is not None:
        value = whole_number(content[:MAX_LABEL].decode("ascii", "replace").strip())
    else:
        value = content
    if keys.label is not None:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_CLASSES:
            return State.NO_CLASS, 0, None
        return State.FINE, value, None
    return State.FINE, 0, value if isinstance(value, bytes | str) and len(value) <= MAX_TEXT else None


def _field(content: bytes | None, name: str) -> object:
    """A field of a sample's JSON; None if there is none."""
    if content is None or len(content) > MAX_TEXT:
        return None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found.get(name) if isinstance(found, dict) else None
