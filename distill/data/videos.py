"""A data set of videos, whose frames are images in folders. Frames are decoded when they are used."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from distill.core.errors import InputError, RunError
from distill.core.text import printable
from distill.data import KindLoader, captions, skipping
from distill.data.cropping import scaled
from distill.data.decoding import COLOURS, UNREADABLE, covering, decode
from distill.data.facts import CHUNK, REASONS, TASK, THREADS, State
from distill.data.images import MAX_PIXELS
from distill.data.index import FoundImages, ImageIndex
from distill.data.indexed import IndexedImages
from distill.data.prompts import FAULTS, CaptionFault, Captions, Prompts, StoredCaption
from distill.data.rows import FileRows, ImageRows, UsableRows
from distill.data.source import Items
from distill.flow.draws import uniforms
from distill.spec import videofolder
from distill.spec.model import VideosData
from distill.spec.videofolder import VideoFolder

SHOWN = 5  # maximum number of names in a message
CANNOT = {  # why a frame cannot be used, by its state
    State.FINE: "has an alpha channel (set data.background)",  # the only fault of such a frame
    State.BROKEN: "cannot be decoded",
    State.EMPTY: "is empty",
    **{state: REASONS[state] for state in (State.MISSING, State.DENIED, State.UNREAD)},
}


def found(spec: VideosData, known: ImageIndex | None) -> FoundImages:
    """The frames of all videos, video by video, and the captions, without reading the frames.

    known: an earlier index; it is not used, because it has no captions that could be used again.
    """
    folder = videofolder.read(spec.path, captions=spec.captions)
    rows = FileRows(folder.root, len(folder.names), folder.names.__getitem__)
    texts = None if folder.captions is None else _captions(folder, folder.captions)
    return FoundImages(rows, folder.names, folder.stats, None, None, captions=texts)


def rows(spec: VideosData, known: ImageIndex) -> FileRows:
    """The rows of indexed videos; the names come from the index."""
    return FileRows(Path(spec.path), len(known), known.name)


def _captions(folder: VideoFolder, names: Sequence[str | None]) -> Captions:
    """The captions of the videos; each frame has that of its video."""

    def task(part: Sequence[str | None]) -> list[StoredCaption]:
        return [None if name is None else captions.of_file(folder.root / name) for name in part]

    with ThreadPoolExecutor(THREADS) as pool:
        starts = range(0, len(names), TASK)
        of_videos = Captions.of(chain.from_iterable(pool.map(task, (names[i : i + TASK] for i in starts))))
    labels = np.repeat(of_videos.labels, folder.counts)
    return Captions(of_videos.prompts, labels, np.zeros((len(labels), 3), np.int64))


class VideoData:
    """Videos as samples [channels, frames, height, width]. Implements `source.DataSet` and `source.Skipping`.

    Videos that cannot be used are reported and skipped: those with too few frames, with frames of different sizes or
    unreadable ones, or without a usable caption. If a frame turns out to be damaged when it is decoded, the next video
    takes the place of its video. More than options.max_unreadable such videos raise InputError.

    index: its rows are the frames, video by video.
    """

    buckets = None
    encoded = False

    def __init__(self, name: str, rows: ImageRows, index: ImageIndex, options: VideosData, seed: int) -> None:
        self.name, self.num_classes = name, index.num_classes
        self.prompts: Prompts | None = None if index.captions is None else index.captions.prompts
        self.shape = (options.channels, *options.size)
        self._rows, self._index, self._options, self._seed = rows, index, options, seed
        self._background = COLOURS[options.background] if isinstance(options.background, str) else options.background
        if self._background is not None and not index.alpha.any():
            raise InputError(
                f"data.background={options.background} has no effect: no frame of {name} has an alpha channel; "
                "remove it"
            )
        self._first = _first_rows(index)
        self._counts = np.diff(self._first, append=len(index))
        self._labels = None if self.prompts is None else torch.from_numpy(index.labels[self._first])
        self._faults = self._found_faults()
        self._usable = UsableRows(len(self._first), np.array(list(self._faults), np.int64))
        self.skipped: list[int] = []
        self.digest = _digest(index, options, self._counts)
        if self._faults:
            self._report()

    def __len__(self) -> int:
        return len(self._usable)

    def items(self, epoch: int, indices: Sequence[int]) -> Items:
        """Returns videos [n, C, F, H, W] float32 in [-1, 1] and labels [n].

        The first frame, the crop and the flip depend on (seed, epoch, number of the video).
        """
        found = [self._item(int(i), epoch) for i in indices]
        labels = None if self._labels is None else self._labels[[video for video, _ in found]]
        samples = default_collate([sample for _, sample in found])  # in shared memory, if this process is a worker
        return Items(samples, labels)

    def skip(self, rows: Sequence[int]) -> None:
        """Skips these videos from now on, because a frame cannot be decoded. See `source.Skipping`."""
        new = [video for video in rows if video not in self._faults]
        self._faults.update((video, "a frame cannot be decoded") for video in new)
        self.skipped += new
        if new:
            self._report()

    def _item(self, i: int, epoch: int) -> tuple[int, Tensor]:
        """The number and the sample of the i-th usable video, or of the next one if that video is damaged.

        The result is the same in every process: it does not depend on which damage a process has already found.
        """
        for k in range(len(self)):
            video = self._usable[(i + k) % len(self)]
            if video in self._faults:
                continue
            try:
                return video, self._sample(video, epoch)
            except (InputError, RunError):
                raise
            except UNREADABLE:
                self.skip([video])
        raise AssertionError("_report refuses a set without usable videos")

    def _sample(self, video: int, epoch: int) -> Tensor:
        options, (frames, height, width) = self._options, self._options.size
        u = uniforms(3, self._seed, epoch, video)  # for crop and flip, as for images
        spare = int(self._counts[video]) - options.span
        first = int(self._first[video]) + spare // 2
        if options.crop == "random":
            first = int(self._first[video]) + int(uniforms(1, "first frame", self._seed, epoch, video)[0] * (spare + 1))
        pixels = np.stack([self._decoded(first + k * options.stride) for k in range(frames)], axis=1)  # [C, F, ...]
        spare_y, spare_x = pixels.shape[2] - height, pixels.shape[3] - width
        if options.crop == "random":
            y, x = int(u[0] * (spare_y + 1)), int(u[1] * (spare_x + 1))
        else:
            y, x = spare_y // 2, spare_x // 2
        sample = torch.from_numpy(pixels[:, :, y : y + height, x : x + width].copy())
        return scaled(sample.flip(3) if options.flip and u[2] < 0.5 else sample)

    def _decoded(self, row: int) -> NDArray[np.generic]:
        """The pixels of a frame. Raises RunError if its file is gone or has changed since it was indexed."""
        name = self._rows.name(row)
        try:
            found = self._rows.read(row)
        except OSError as error:
            raise RunError(f"{name} cannot be read any more: {error.strerror}; restore it, then resume") from error
        assert found is not None and found.file is not None, "rows of usable videos are files"
        if not self._index.is_same_content(row, found.file):
            raise RunError(f"{name} has changed since the data was indexed; restore the old file, then resume")
        options = self._options
        return decode(found.content, name, options.size[1:], options.channels, self._background)

    # --- checks ---

    def _found_faults(self) -> dict[int, str]:
        """Number of each video that cannot be used -> why, in the order of the videos."""
        index, options, first = self._index, self._options, self._first
        unusable = index.state != State.FINE
        if self._background is None:
            unusable |= index.alpha != 0
        faults: dict[int, str] = {}
        for video in np.flatnonzero(np.logical_or.reduceat(unusable, first)).tolist():
            frames = range(first[video], first[video] + self._counts[video])
            row = next(row for row in frames if unusable[row])
            faults[video] = f"{self._frame(row)} {CANNOT.get(State(int(index.state[row])), 'cannot be used')}"
        low, high = np.minimum.reduceat(index.sides, first), np.maximum.reduceat(index.sides, first)
        for video in np.flatnonzero((low != high).any(1)).tolist():
            faults.setdefault(video, "its frames have different sizes")
        for video in np.flatnonzero(self._counts < options.span).tolist():
            faults.setdefault(video, f"{self._counts[video]} frames, {options.span} are needed")
        scales = np.max(np.array(options.size[1:]) / low.clip(1), axis=1)
        for video in np.flatnonzero(scales**2 * low.clip(1).prod(axis=1, dtype=np.float64) > MAX_PIXELS).tolist():
            height, width = low[video].clip(1).tolist()
            covers = covering(height, width, options.size[1:])
            faults.setdefault(video, f"an extreme aspect ratio: frames would be resized to {covers[1]} x {covers[0]}")
        if self._labels is not None:
            for video in np.flatnonzero(self._labels.numpy() < 0).tolist():
                faults.setdefault(video, FAULTS[CaptionFault(-int(self._labels[video]))])
        return dict(sorted(faults.items()))

    def _frame(self, row: int) -> str:
        return f"frame {printable(self._index.name(row).rpartition('/')[2])}"

    def _report(self) -> None:
        """Warns about the videos that are skipped so far. Raises InputError if there are too many."""
        (found, names), total = self.unusable(SHOWN), len(self._first)
        skipping.report(
            f"{self.name}: {found} of {total} videos cannot be used",
            names,
            found=found,
            total=total,
            limit=self._options.max_unreadable,
            todo="repair or remove them",
        )

    def unusable(self, most: int) -> tuple[int, list[str]]:
        """How many videos are skipped so far, and the first ones."""
        first = islice(self._faults.items(), most)
        return len(self._faults), [f"{self._shown(video)}: {why}" for video, why in first]

    def _shown(self, video: int) -> str:
        return printable(self._index.name(int(self._first[video])).rpartition("/")[0])


def _first_rows(index: ImageIndex) -> NDArray[np.int64]:
    """The row of the first frame of each video: the folder of the frame is another one than that of the row before."""
    ends, content = index.ends, index.names
    starts = np.concatenate([[0], ends[:-1]])
    slashes = np.concatenate([[-1], np.flatnonzero(content == ord("/"))])
    lengths = (slashes[np.searchsorted(slashes, ends) - 1] - starts).clip(0)  # of the folder of each name
    is_first = np.ones(len(index), np.bool_)
    is_first[1:] = lengths[1:] != lengths[:-1]
    for begin in range(1, len(index), CHUNK):
        rows = begin + np.flatnonzero(~is_first[begin : begin + CHUNK] & (lengths[begin : begin + CHUNK] > 0))
        if not len(rows):
            continue
        sizes = lengths[rows]
        within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        ours, theirs = (content[np.repeat(starts[each], sizes) + within] for each in (rows, rows - 1))
        is_first[rows] = np.logical_or.reduceat(ours != theirs, sizes.cumsum() - sizes)
    return np.flatnonzero(is_first)


def _digest(index: ImageIndex, options: VideosData, counts: NDArray[np.int64]) -> str:
    """SHA-256 over the frames, their order, the captions and the options that change samples."""
    used = (options.size, options.stride, options.channels, options.crop, options.flip, options.background)
    content = hashlib.sha256(repr(used).encode())
    if index.captions is not None:
        content.update(index.captions.prompts.digest.encode())
        content.update(index.labels.astype("<i8").data)
    for part in _parts(index, counts):
        content.update(part)
    return content.hexdigest()


def _parts(index: ImageIndex, counts: NDArray[np.int64]) -> Iterator[memoryview]:
    yield counts.astype("<i8").data
    yield np.ascontiguousarray(index.state).data
    yield np.ascontiguousarray(index.sha256).data


LOADER: KindLoader[VideosData] = IndexedImages(found, rows, VideoData, keeps_decoded=False)
