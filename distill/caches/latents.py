"""Encodes the images of a data set, shard by shard. A process that is killed loses only the shard it is working on."""

from pathlib import Path

import torch

from distill.core.field_types import FrozenModel
from distill.core.stop import StopRequest
from distill.data.source import DataSet
from distill.protocols import Codec
from distill.runs.progress import Progress
from distill.spec.cachespec import CacheStage


class LatentManifest(FrozenModel):
    """All settings that the values of a cache of latents depend on, and its shards."""

    @property
    def key(self) -> str:
        """SHA-256 over the settings, without the shards: the folder is STORE/caches/latents-KEY."""
        raise NotImplementedError

    @property
    def digest(self) -> str:
        """SHA-256 over everything, with the checksums of the shards."""
        raise NotImplementedError


def plan(data: DataSet, codec: Codec, stage: CacheStage, *, seed: int, mirrored: bool = False) -> LatentManifest:
    """The manifest of a cache of latents, without shards. No network is loaded.

    data: with crop: center and without flip. mirrored: also store mirrored images (for data with flip). InputError if
    `stage.latents` does not fit the codec.
    """
    raise NotImplementedError


def generate(
    data: DataSet,
    codec: Codec,
    stage: CacheStage,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
    stop: StopRequest,
    part: tuple[int, int] | None = None,
    mirrored: bool = False,
    max_unreadable: int = 0,
) -> None:
    """Make the shards of a cache that `folder` does not have yet, from the items of epoch 0.

    The progress counts images: `plan(...).count` in total, or `plan(...).layout.pairs(layout.part(part))`.

    part: (i, n) makes only the shards i, i + n, ...; the process that ends last completes the set. InputError if the
    folder holds another set or cannot be written; RunError if latents are not finite.
    """
    raise NotImplementedError
