"""A data set of images that are streamed: rows of parquet files, which are read when they are used."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from distill.core.errors import InputError, RunError
from distill.data import skipping
from distill.data.cropping import Cropped, cropped
from distill.data.decoding import COLOURS, UNREADABLE, covering, decode, header
from distill.data.images import MAX_PIXELS, SHOWN
from distill.data.order import Ranges
from distill.data.prompts import FAULTS, CaptionFault
from distill.data.rows import UsableRows
from distill.data.source import Items
from distill.data.streamindex import StreamIndex
from distill.data.streamrows import StreamRows
from distill.shards.order import GROUP
from distill.spec.model import HfData


class StreamData:
    """Rows of a stream as samples [channels, height, width]. Implements `source.DataSet`.

    Images are checked when they are decoded. If one is damaged, the next one takes its place. More than
    options.max_unreadable damaged images and images without a usable caption raise InputError.
    """

    buckets = None
    encoded = False
    group = GROUP

    def __init__(self, name: str, index: StreamIndex, options: HfData, seed: int) -> None:
        self.name, self.prompts = name, index.captions
        self.num_classes = index.head.num_classes if self.prompts is None else len(self.prompts)
        self.shape = (options.channels, *options.height_width)
        self._rows, self._index, self._options, self._seed = StreamRows(options, index), index, options, seed
        self._background = COLOURS[options.background] if isinstance(options.background, str) else options.background
        self._labels = torch.from_numpy(index.labels) if len(index.labels) else None
        without = np.flatnonzero(index.labels < 0) if self.prompts is not None else np.empty(0, np.int64)
        self._usable = UsableRows(len(index), without)
        self.shards = [Ranges(self._usable.before(index.stops), len(self))]
        self.digest = _digest(index, options)
        self.skipped: list[int] = []
        self._skipped: set[int] = set()  # the same rows
        if len(without):
            self._report()

    def __len__(self) -> int:
        return len(self._usable)

    def items(self, epoch: int, indices: Sequence[int]) -> Items:
        """Returns images [n, C, H, W] float32 in [-1, 1], labels [n] and sizes [n, 6].

        Crop and flip depend on (seed, epoch, row). Raises RunError if the source cannot be read any more.
        """
        found = [self._item(int(i), epoch) for i in indices]
        labels = None if self._labels is None else self._labels[[each.row for each in found]]
        images = default_collate([each.pixels for each in found])  # in shared memory, if this process is a worker
        return Items(images, labels, torch.tensor([each.sizes for each in found]))

    def skip(self, rows: Sequence[int]) -> None:
        """Skips these rows from now on, because they cannot be decoded. See `source.Skipping`."""
        new = [row for row in rows if row not in self._skipped]
        self._skipped.update(new)
        self.skipped += new
        if new:
            self._report()

    def _item(self, i: int, epoch: int) -> Cropped:
        """The i-th usable image, or of the next one if that image is damaged.

        The result is the same in every process: it does not depend on which damage a process has already found.
        """
        for k in range(len(self)):
            row = self._usable[(i + k) % len(self)]
            if row in self._skipped:
                continue
            try:
                pixels, sides = self._decoded(row)
            except (InputError, RunError):
                raise
            except UNREADABLE:
                self.skip([row])
            else:
                return cropped(pixels, sides, self._options.height_width, self._options, self._seed, epoch, row)
        raise AssertionError("_report refuses a stream without usable images")

    def _decoded(self, row: int) -> tuple[NDArray[np.generic], tuple[int, int]]:
        """Pixels, and height and width of the original. Raises one of UNREADABLE if the image is damaged."""
        content = self._rows.read(row)
        if content is None:
            raise ValueError("the row has no image")
        sides, options = header(content), self._options
        height, width = covering(sides.height, sides.width, options.height_width)
        if height * width > MAX_PIXELS:
            raise ValueError("an extreme aspect ratio")
        pixels = decode(content, self._rows.name(row), options.height_width, options.channels, self._background)
        return pixels, (sides.height, sides.width)

    def unusable(self, most: int) -> tuple[int, list[str]]:
        """How many images are skipped so far, and the first ones; those without a usable caption come last."""
        without = self._usable.unusable
        why = "no image, a damaged one, or an extreme aspect ratio"
        names = [f"{self._rows.name(row)}: {why}" for row in sorted(self._skipped)[:most]]
        for row in without[: most - len(names)].tolist():
            names.append(f"{self._rows.name(row)}: {FAULTS[CaptionFault(-int(self._index.labels[row]))]}")
        return len(without) + len(self._skipped), names

    def _report(self) -> None:
        """Warns about the unusable images found so far. Raises InputError if there are too many."""
        (found, names), total = self.unusable(SHOWN), len(self._index)
        skipping.report(
            f"{self.name}: {found} of {total} images cannot be used",
            names,
            found=found,
            total=total,
            limit=self._options.max_unreadable,
            todo="remove them",
        )


def _digest(index: StreamIndex, options: HfData) -> str:
    """SHA-256 over what identifies the rows, and the options that change samples."""
    chosen = (options.image_column, options.size, options.channels, options.crop, options.flip, options.background)
    return hashlib.sha256(f"{index.digest} {chosen}".encode()).hexdigest()
