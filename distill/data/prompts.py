"""Prompts and captions: many texts in two arrays, and the checks that every text must pass."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import chain, islice
from typing import overload

import numpy as np
from numpy.typing import NDArray

from distill.core.text import is_text

CHUNK = 2**16  # texts that are processed together
MAX_LENGTH = 2**16  # maximum number of characters of a caption or prompt


class Prompts(Sequence[str]):
    """N texts, stored as UTF-8 in one array, so that millions of them take little more memory than their bytes.

    content: [total] uint8, the bytes of all texts, concatenated. ends: [N] int64, where each text ends in `content`.
    Both must be valid; arrays from a file are checked with `are_valid` first.
    """

    def __init__(self, content: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.content, self.ends = content, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Prompts":
        """All texts, in their order, with repetitions."""
        parts, lengths = [np.empty(0, np.uint8)], [np.empty(0, np.int64)]
        for chunk in _chunks(texts):
            encoded = [text.encode() for text in chunk]
            parts.append(np.frombuffer(b"".join(encoded), np.uint8))
            lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        return cls(np.concatenate(parts), np.concatenate(lengths).cumsum())

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]  # raises IndexError
        start = int(self.ends[row - 1]) if row else 0
        return self.content[start : int(self.ends[row])].tobytes().decode()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all texts and their order."""
        found = hashlib.sha256(self.ends.astype("<i8").tobytes())
        found.update(np.ascontiguousarray(self.content).data)
        return found.hexdigest()


def are_valid(content: NDArray[np.uint8], ends: NDArray[np.int64]) -> bool:
    """Whether arrays from a file are prompts (see `Prompts`): none is empty, and each is valid UTF-8."""
    if not len(ends):
        return not len(content)
    if ends[0] <= 0 or (ends[1:] <= ends[:-1]).any() or ends[-1] != len(content):
        return False
    start = 0
    for stop in chain(ends[CHUNK - 1 : -1 : CHUNK].tolist(), [len(content)]):
        try:
            content[start:stop].tobytes().decode()
        except UnicodeDecodeError:
            return False
        start = stop
    begins_inside = (content[ends[:-1]] & 0xC0) == 0x80  # a byte that continues a character
    return not begins_inside.any()


def unique(texts: Iterable[str]) -> tuple[Prompts, NDArray[np.int64]]:
    """The different texts in the order of their first appearance, and the number of each given text, [N] int64.

    Memory: the bytes of the texts, once for each chunk of 65,536 in which they appear, and 24 bytes for each.
    """
    found: list[Prompts] = []
    numbers: list[NDArray[np.int64]] = []  # by chunk: of each text among the different texts of all chunks
    hashes = [np.empty((0, 2), np.uint64)]
    total = 0
    for chunk in _chunks(texts):
        own = {text: i for i, text in enumerate(dict.fromkeys(chunk))}
        numbers.append(np.fromiter((own[text] for text in chunk), np.int64, len(chunk)) + total)
        digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in own)
        hashes.append(np.frombuffer(digests, np.uint64).reshape(-1, 2))
        found.append(Prompts.of(own))
        total += len(own)
    if not found:
        return Prompts.of(()), np.empty(0, np.int64)
    firsts, number = _groups(np.concatenate(hashes))
    labels = np.concatenate([number[each] for each in numbers])
    is_first = np.zeros(total, bool)
    is_first[firsts] = True
    starts = np.cumsum([0, *map(len, found)])
    contents, lengths = [], []
    for prompts, start in zip(found, starts[:-1].tolist(), strict=True):
        kept = is_first[start : start + len(prompts)]
        sizes = np.diff(prompts.ends, prepend=0)
        contents.append(prompts.content[np.repeat(kept, sizes)])
        lengths.append(sizes[kept])
    return Prompts(np.concatenate(contents), np.concatenate(lengths).cumsum()), labels


def _groups(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers the different rows of [M, 2] in the order of first appearance.

    Returns the first row of each number, and the number of each row.
    """
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: the first row of a group has the lowest index
    ordered = hashes[order]
    begins = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(1)])
    group = np.empty(len(order), np.int64)
    group[order] = begins.cumsum() - 1
    firsts = order[begins]
    rank = np.empty(len(firsts), np.int64)
    rank[np.argsort(firsts)] = np.arange(len(firsts))
    return np.sort(firsts), rank[group]


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


# --- captions ---


class CaptionFault(IntEnum):
    """Why there is no usable caption."""

    ABSENT = 1
    EMPTY = 2
    NOT_UTF8 = 3
    CONTROL = 4
    LONG = 5
    UNREAD = 6


StoredCaption = bytes | str | CaptionFault | None  # a caption as it is stored, or why it cannot be used

FAULTS = {
    CaptionFault.ABSENT: "no caption",
    CaptionFault.EMPTY: "an empty caption",
    CaptionFault.NOT_UTF8: "a caption that is not UTF-8",
    CaptionFault.CONTROL: "a caption with control characters",
    CaptionFault.LONG: f"a caption of more than {MAX_LENGTH:,} characters",
    CaptionFault.UNREAD: "a caption that cannot be read",
}


def cleaned(found: bytes | str | None) -> str | CaptionFault:
    """A caption or prompt without whitespace at both ends, or why it cannot be used. Bytes may begin with a BOM."""
    if found is None:
        return CaptionFault.ABSENT
    if isinstance(found, bytes):
        try:
            found = found.decode("utf-8-sig")
        except UnicodeDecodeError:
            return CaptionFault.NOT_UTF8
    text = found.strip()
    if not text:
        return CaptionFault.EMPTY
    if len(text) > MAX_LENGTH:
        return CaptionFault.LONG
    return text if is_text(text) else CaptionFault.CONTROL


@dataclass(frozen=True)
class Captions:
    """The captions of N images."""

    prompts: Prompts
    """the different captions, in the order of their first appearance"""
    labels: NDArray[np.int64]
    """[N]: number of each image's prompt; negative: minus a CaptionFault, because the image has no usable caption"""
    files: NDArray[np.int64]
    """[N, 3]: size, mtime and ctime in ns of the file that holds only this caption; 0: there is none"""

    @classmethod
    def of(cls, found: Iterable[StoredCaption]) -> "Captions":
        """Checks the captions as they are stored, one for each image. None: the image has no caption."""
        faults = array("b")

        def usable() -> Iterator[str]:
            for each in found:
                text = each if isinstance(each, CaptionFault) else cleaned(each)
                faults.append(text if isinstance(text, CaptionFault) else 0)
                if not isinstance(text, CaptionFault):
                    yield text

        prompts, numbers = unique(usable())
        labels = -np.array(faults, np.int64)
        labels[labels == 0] = numbers
        return cls(prompts, labels, np.zeros((len(labels), 3), np.int64))
