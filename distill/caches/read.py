"""Reading a cache of latents: a data set that maps a few shards at a time."""

from collections.abc import Sequence
from pathlib import Path

from distill.caches.latents import LatentManifest
from distill.data.source import Items


class CachedLatents:
    """A complete cache of latents. Implements `data.DataSet`."""

    manifest: LatentManifest
    name: str
    shape: tuple[int, ...]
    num_classes: int | None
    digest: str
    """that of the manifest"""
    encoded: bool
    """whether the samples are latents already, so that the codec must not encode them; false: pixels"""

    def __len__(self) -> int:
        raise NotImplementedError

    def items(self, epoch: int, indices: Sequence[int]) -> Items:
        """Samples [n, ...] float32, labels and sizes. Moments are sampled by (seed, epoch, index)."""
        raise NotImplementedError


def open_latents(folder: Path, seed: int, *, codec_digest: str | None = None) -> CachedLatents:
    """Open a complete cache. Only the manifest and the sizes of the files are checked; see `verify`.

    seed: of samples of the moments and of the choice of mirrored images. codec_digest: of the autoencoder that must
    have made it; None: any. InputError if it is incomplete, or made by another autoencoder.
    """
    raise NotImplementedError


def verify(folder: Path, rank: int = 0, size: int = 1) -> None:
    """Compare the shards of a cache (latents or prompts) with their checksums. InputError if one is damaged.

    rank, size: only the shards rank, rank + size, ...
    """
    raise NotImplementedError
