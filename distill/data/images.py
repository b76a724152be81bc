"""A data set of encoded images (PNG, JPEG ...), which are decoded, cropped and flipped when they are used."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate, get_worker_info

from distill.core.errors import InputError, RunError
from distill.data import skipping
from distill.data.aspects import nearest
from distill.data.cropping import Cropped, cropped
from distill.data.decoding import COLOURS, SET_BACKGROUND, UNREADABLE, Colour, covering, decode
from distill.data.facts import REASONS, State
from distill.data.index import ImageIndex
from distill.data.prompts import FAULTS, CaptionFault, Prompts
from distill.data.rows import ImageRows, UsableRows
from distill.data.source import Bucket, Items
from distill.spec.model import ImageOptions

# Maximum size of the decoded images that a data set keeps in memory, in one process or in all workers of it.
KEEP_BYTES = 2**30
MAX_PIXELS = 2**26  # maximum size of an image after it is resized to cover a sample
SHOWN = 5  # maximum number of names in a message
BLOCK = 2**16  # rows that are hashed or checked together


class ImageData:
    """Rows of encoded images as samples [channels, height, width]. Implements `source.DataSet`.

    Images that the index lists as damaged, of an extreme aspect ratio, or without a usable caption, are reported and
    skipped. If an image turns out to be damaged when it is decoded, the next image takes its place. More than
    options.max_unreadable such images raise InputError. Grey images are repeated to three channels in a colour data
    set, and colour images are converted to grey in a grey one. Images with an alpha channel need options.background.
    With options.buckets, samples have the size of the bucket with the most similar aspect ratio.
    """

    encoded = False

    def __init__(self, name: str, rows: ImageRows, index: ImageIndex, options: ImageOptions, seed: int) -> None:
        if len(rows) == 0:
            raise InputError(f"data '{name}' has no rows")
        self.name, self.num_classes = name, index.num_classes
        self.prompts: Prompts | None = None if index.captions is None else index.captions.prompts
        self.shape = (options.channels, *options.height_width)
        self._rows, self._index, self._options, self._seed = rows, index, options, seed
        self._background = COLOURS[options.background] if isinstance(options.background, str) else options.background
        self._kept: dict[int, NDArray[np.generic]] = {}
        self._kept_bytes = 0
        self._sizes = options.sizes
        # The position in _sizes of each row's size; without buckets, it is 0 for all rows.
        self._size_of = None if options.buckets is None else nearest(index.sides, self._sizes)
        long = self._too_long() & (index.state == State.FINE)
        self._has_long = bool(long.any())
        unusable = (index.state != State.FINE) | long
        if self.prompts is not None:
            unusable |= index.labels < 0
        self._refuse(~unusable)
        self._readable = UsableRows(len(index), np.flatnonzero(unusable))
        self.buckets = None if self._size_of is None else self._in_buckets(self._size_of[~unusable])
        self.skipped: list[int] = []
        self._skipped: set[int] = set()  # the same rows
        self._labels = None if self.num_classes is None else torch.from_numpy(index.labels)
        self.digest = _digest(index, options, self._background, self._sizes, ~unusable)
        if len(self._readable) < len(index):
            self._report()

    def __len__(self) -> int:
        return len(self._readable)

    def items(self, epoch: int, indices: Sequence[int]) -> Items:
        """Returns images [n, C, H, W] float32 in [-1, 1], labels [n] and sizes [n, 6].

        Crop and flip depend on (seed, epoch, row). ValueError if the images are of several buckets.
        """
        found = [self._item(int(i), epoch) for i in indices]
        if len(shapes := {tuple(each.pixels.shape) for each in found}) > 1:
            raise ValueError(f"images of several buckets were asked for: {sorted(shapes)}")
        labels = None if self._labels is None else self._labels[[each.row for each in found]]
        images = default_collate([each.pixels for each in found])  # in shared memory, if this process is a worker
        return Items(images, labels, torch.tensor([each.sizes for each in found]))

    def with_label(self, label: int) -> int | None:
        """The first readable item with a label."""
        rows = np.flatnonzero(self._index.labels == label)
        usable = rows[~np.isin(rows, self._readable.unusable)]
        return int(self._readable.before(usable[:1])[0]) if len(usable) else None

    def _item(self, i: int, epoch: int) -> Cropped:
        """Returns the i-th readable image, or the next one of its bucket if that image is damaged.

        The result is the same in every process: it does not depend on which damage a process has already found.
        """
        peers: Sequence[int] | NDArray[np.int64] = range(len(self))
        if self.buckets is not None and self._size_of is not None:
            peers = self.buckets[self._size_of[self._readable[i]]].items
        first = int(np.searchsorted(peers, i)) if isinstance(peers, np.ndarray) else i
        for k in range(len(peers)):
            row = self._readable[int(peers[(first + k) % len(peers)])]
            if row in self._skipped:
                continue
            try:
                pixels = self._decoded(row)
            except (InputError, RunError):
                raise
            except UNREADABLE:
                self.skip([row])
            else:
                sides = (int(self._index.sides[row, 0]), int(self._index.sides[row, 1]))
                return cropped(pixels, sides, self._size(row), self._options, self._seed, epoch, row)
        height, width = self._size(self._readable[i])
        raise InputError(
            f"{self.name}: none of the {len(peers)} images of the bucket {height}x{width} (height x width) can be "
            "decoded; repair or remove them"
        )

    def skip(self, rows: Sequence[int]) -> None:
        """Skips these rows from now on, because they cannot be decoded. See `source.Skipping`."""
        new = [row for row in rows if row not in self._skipped]
        self._skipped.update(new)
        self.skipped += new
        if new:
            self._report()

    def unusable(self, most: int) -> tuple[int, list[str]]:
        """How many images are skipped so far, and the first ones: those that the index lists come first."""
        known = self._readable.unusable
        rows = [*known[:most].tolist(), *self.skipped[: max(0, most - len(known))]]
        return len(known) + len(self.skipped), [self._shown(row) for row in rows]

    def _in_buckets(self, size_of: NDArray[np.int16]) -> list[Bucket]:
        """The readable images of each bucket. size_of: the bucket of each of them."""
        order, ends = np.argsort(size_of, kind="stable"), np.cumsum(np.bincount(size_of, minlength=len(self._sizes)))
        shapes = [(self._options.channels, *size) for size in self._sizes]
        return [Bucket(*each) for each in zip(shapes, np.split(order, ends[:-1]), strict=True)]

    def _size(self, row: int) -> tuple[int, int]:
        """Height and width of a row's samples."""
        return self._sizes[0 if self._size_of is None else self._size_of[row]]

    def _decoded(self, row: int) -> NDArray[np.generic]:
        if row in self._kept:
            return self._kept[row]
        channels = self._options.channels
        pixels = decode(self._encoded(row), self._rows.name(row), self._size(row), channels, self._background)
        worker = get_worker_info()  # the workers of a process share its limit
        if self._kept_bytes + pixels.nbytes <= KEEP_BYTES // (1 if worker is None else worker.num_workers):
            self._kept[row] = pixels
            self._kept_bytes += pixels.nbytes
        return pixels

    def _encoded(self, row: int) -> bytes:
        """The stored bytes of an image. Raises RunError if its file is gone or has changed since it was indexed."""
        try:
            found = self._rows.read(row)
        except OSError as error:
            raise RunError(
                f"{self._rows.name(row)} cannot be read any more: {error.strerror}; restore it, then resume"
            ) from error
        assert found is not None, "rows without an image are not readable"
        if found.file is not None and not self._index.is_same_content(row, found.file):
            raise RunError(
                f"{self._rows.name(row)} has changed since the data was indexed; restore the old file, then resume"
            )
        return found.content

    def _shown(self, row: int) -> str:
        reason = REASONS.get(State(int(self._index.state[row])))
        if self.prompts is not None and self._index.labels[row] < 0 and reason is None:
            reason = FAULTS[CaptionFault(-int(self._index.labels[row]))]
        if reason is None and self._has_long and self._too_long(row, row + 1).any():
            height, width = self._index.sides[row].tolist()
            covers = covering(height, width, self._size(row))
            reason = (
                f"an extreme aspect ratio: {width} x {height} pixels would be resized to {covers[1]} x {covers[0]}, "
                f"more than {MAX_PIXELS:,} pixels"
            )
        if reason is None and self.prompts is not None:
            reason = "cannot be decoded"
        return self._rows.name(row) + (f": {reason}" if reason else "")

    # --- checks ---

    def _refuse(self, usable: NDArray[np.bool_]) -> None:
        """Raises InputError if images cannot be used as they are; one message lists all with the same problem."""
        index, total = self._index, len(self._index)
        has_alpha = (index.alpha != 0) & usable
        if self._background is None and has_alpha.any():
            rows = np.flatnonzero(has_alpha)
            raise InputError(
                f"{self.name}: {len(rows)} of {total} images have an alpha channel: {self._names(rows)}; "
                f"{SET_BACKGROUND}"
            )
        if self._background is not None and not index.alpha.any():
            raise InputError(
                f"data.background={self._options.background} has no effect: none of the {total} images of "
                f"{self.name} has an alpha channel; remove it"
            )

    def _too_long(self, first: int = 0, last: int | None = None) -> NDArray[np.bool_]:
        """Whether the images of these rows have more than MAX_PIXELS pixels after resizing. last: None for all rows."""
        found, sizes = [], np.array(self._sizes)
        stop = len(self._index) if last is None else last
        for start in range(first, stop, BLOCK):
            part = slice(start, min(start + BLOCK, stop))
            height, width = self._index.sides[part].clip(1).T.astype(np.float64)
            target = sizes[[0] if self._size_of is None else self._size_of[part]]
            scales = np.maximum(target[:, 0] / height, target[:, 1] / width)
            found.append(scales**2 * (height * width) > MAX_PIXELS)
        return np.concatenate(found)

    def _names(self, rows: NDArray[np.int64]) -> str:
        return ", ".join(map(self._rows.name, rows[:SHOWN].tolist())) + (", ..." if len(rows) > SHOWN else "")

    def _report(self) -> None:
        """Warns about the unreadable images found so far. Raises InputError if there are too many."""
        (found, names), total = self.unusable(SHOWN), len(self._index)
        decodable = self.prompts is None and self._index.members is None and not self._has_long
        problem = "cannot be decoded" if decodable else "cannot be used"
        skipping.report(
            f"{self.name}: {found} of {total} images {problem}",
            names,
            found=found,
            total=total,
            limit=self._options.max_unreadable,
            todo=f"{'crop, ' if self._has_long else ''}repair or remove them",
        )


def _digest(
    index: ImageIndex,
    options: ImageOptions,
    background: Colour | None,
    sizes: Sequence[tuple[int, int]],
    usable: NDArray[np.bool_],
) -> str:
    """SHA-256 over the options that change samples, the captions, and the images that have bytes.

    Of these: first all checksums, then a byte 1 for each that is usable (0 for others), then the labels of the usable
    ones as int64, if there are labels. It is computed each time the data is opened, in seconds for 100 million images.

    usable: [N]
    """
    content = hashlib.sha256(repr((options.size, options.channels, options.crop, options.flip)).encode())
    if options.buckets is not None:
        content.update(repr(sizes).encode())
    if background is not None:
        content.update(repr(background).encode())
    if index.captions is not None:
        content.update(index.captions.prompts.digest.encode())
    has_bytes = index.state < State.EMPTY
    fields = [(index.sha256, has_bytes), (usable, has_bytes), *([(index.labels, usable)] if len(index.labels) else [])]
    for values, chosen in fields:
        for start in range(0, len(index), BLOCK):
            part = slice(start, start + BLOCK)
            used = chosen[part]
            content.update(np.ascontiguousarray(values[part] if used.all() else values[part][used]).data)
    return content.hexdigest()
