"""A data set of latents that others have computed. Samples are read from mapped files when they are used."""

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.core.errors import InputError, RunError
from distill.core.text import printable
from distill.data import KindLoader, arrayfile, latent_index
from distill.data.latent_index import LatentIndex
from distill.data.source import Items
from distill.flow.draws import key, sample_noise, uniforms
from distill.flow.mapped import MappedArray, arrays
from distill.spec.model import LatentsData

OPEN = 128  # files that a process keeps mapped at most
LOG_VARIANCE = (-30.0, 20.0)  # limits of log variances, as in diffusers

_INDEXES: dict[Path, LatentIndex] = {}  # by their path relative to a store or a run


class LatentData:
    """Samples of the files of a `LatentsData`. Implements `source.DataSet`.

    Samples of moments, and whether a sample is mirrored, depend on (seed, epoch, index). InputError if values are not
    finite; RunError if a file is gone or has changed since it was indexed.

    scaled: see `LatentsData.scaled`; if not, `encoded.scaled_for` scales the samples.
    """

    buckets = None
    prompts = None
    encoded = True

    def __init__(self, name: str, index: LatentIndex, spec: LatentsData, seed: int) -> None:
        self.name, self.num_classes, self.scaled = name, index.head.num_classes, spec.scaled
        stored = index.head.shape
        self.shape = (stored[0] // 2, *stored[1:]) if spec.moments else stored
        self._index, self._spec, self._seed = index, spec, seed
        self._ends = index.counts.cumsum()
        self._labels = None if self.num_classes is None else torch.from_numpy(index.labels)
        self.digest = _digest(index, spec)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def items(self, epoch: int, indices: Sequence[int]) -> Items:
        """Returns samples [n, ...] float32 and labels [n]."""
        wanted = np.array(indices, np.int64)
        stored = torch.empty(len(wanted), *self._index.head.shape)
        mirrored = self._mirrored(epoch, wanted)
        files = np.searchsorted(self._ends, wanted, side="right")
        rows = wanted - (self._ends - self._index.counts)[files]
        for file in np.unique(files).tolist():
            for is_mirrored in (False, True):
                chosen = np.flatnonzero((files == file) & (mirrored == is_mirrored))
                if len(chosen):
                    name = self._spec.mirrored_key if is_mirrored else self._index.head.key
                    stored[torch.from_numpy(chosen)] = self._read(file, name or "", rows[chosen].tolist())
        samples = _sampled(stored, self._seed, epoch, indices) if self._spec.moments else stored
        return Items(samples, None if self._labels is None else self._labels[torch.from_numpy(wanted)])

    def _mirrored(self, epoch: int, wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
        if self._spec.mirrored_key is None:
            return np.zeros(len(wanted), np.bool_)
        return np.array([uniforms(1, "mirrored", self._seed, epoch, i)[0] < 0.5 for i in wanted.tolist()], np.bool_)

    def _read(self, file: int, name: str, rows: Sequence[int]) -> Tensor:
        """Rows of a tensor of a file as they are stored, in float32."""
        array = self._opened(file)[name]
        whole = array.shape == self._index.head.shape  # the file holds one sample
        found = (array.whole()[None] if whole else array.take(rows)).float()
        finite = found.isfinite().flatten(1).all(1)
        if not finite.all():
            row = rows[int((~finite).nonzero()[0])]
            at = "" if whole else f" in sample {row} (rows count from 0)"
            raise InputError(f"{array.shown} contains NaN or infinity{at}; remove this sample, or make it again")
        return found

    def _opened(self, file: int) -> dict[str, MappedArray]:
        path = Path(self._spec.path, self._index.name(file))
        try:
            state = path.stat()
        except OSError as error:
            raise RunError(
                f"{printable(str(path))} cannot be read any more: {error.strerror}; restore it, then resume"
            ) from error
        if (state.st_size, state.st_mtime_ns) != tuple(self._index.file[file, :2].tolist()):
            raise RunError(
                f"{printable(str(path))} has changed since the data was indexed; restore the old file, then resume"
            )
        return _mapped(os.fspath(path), state.st_size, state.st_mtime_ns)


@lru_cache(OPEN)
def _mapped(path: str, size: int, changed: int) -> dict[str, MappedArray]:
    """The arrays of a file of this size and mtime. They belong to the process, so data sets can be pickled."""
    return dict(arrays(Path(path)))


def _sampled(moments: Tensor, seed: int, epoch: int, indices: Sequence[int]) -> Tensor:
    """Samples [n, C, ...] of means and log variances [n, 2C, ...]."""
    mean, log_variance = moments.chunk(2, dim=1)
    noise = sample_noise(key("latents", seed, epoch), indices, tuple(mean.shape[1:]))
    return mean + (0.5 * log_variance.clamp(*LOG_VARIANCE)).exp() * noise


def _digest(index: LatentIndex, spec: LatentsData) -> str:
    """SHA-256 over the files, the labels and the options that change samples."""
    options = (index.head.shape, index.head.key, spec.mirrored_key, spec.moments)
    content = hashlib.sha256(repr(options).encode())
    content.update(index.sha256.tobytes())
    content.update(np.ascontiguousarray(index.labels, "<i8").data)
    return content.hexdigest()


class _Latents:
    """Loads data of kind latents. Implements `data.KindLoader`."""

    def load(self, spec: LatentsData, seed: int, folder: Path | None, *, keep: bool, indexed: bool) -> LatentData:
        """See `data.load_data`. keep has no effect, because nothing is decoded."""
        known = None if folder is None else latent_index.read(folder / spec.index_file)
        found = known if indexed and known is not None else _indexed(spec, known)
        return LatentData(spec.name, found, spec, seed)

    def update_index(self, spec: LatentsData, store: Path, run: Path | None) -> None:
        """See `data.update_index`."""

        def make(known: LatentIndex | None) -> LatentIndex:
            return _indexed(spec, known)

        arrayfile.update(spec.index_file, store, run, read=latent_index.read, make=make, write=latent_index.write)


def _indexed(spec: LatentsData, known: LatentIndex | None) -> LatentIndex:
    """The index of latents, in which only new and changed files are read."""
    place = spec.index_file
    _INDEXES[place] = latent_index.make(spec, _INDEXES.get(place, known))
    return _INDEXES[place]


LOADER: KindLoader[LatentsData] = _Latents()
