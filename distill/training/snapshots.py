"""Snapshots of averages: with those of some lengths at several times, averages of other lengths can be made afterwards.

    snapshots/step-00001234/            complete or absent, as a checkpoint
        ema.student.0.05.safetensors    the same file as in the checkpoint of this step
        ema.student.0.1.safetensors
        meta.json

A snapshot is made of a checkpoint, by links to its files, so it takes space only when the checkpoint is deleted.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from distill.core.atomic import new_folder
from distill.core.errors import InputError
from distill.training.checkpoint_files import (
    Checkpoint,
    Damaged,
    Meta,
    clear,
    complete,
    ema_group,
    group_of,
    length_of_group,
    read_meta,
    remove,
    step_of,
    store,
    verified,
)
from distill.training.ema import mixture


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of a training.

    lengths: of the averages. every: images between snapshots. batch: images of a step. total: images of the training.
    """

    folder: Path
    lengths: Sequence[float]
    every: int
    batch: int
    total: int

    def due(self, images: int) -> bool:
        """Whether the checkpoint after `images` images is kept as a snapshot."""
        return images % self.every < self.batch or images >= self.total

    def keep(self, checkpoint: Path, meta: Meta) -> None:
        """Make the snapshot of a complete checkpoint, unless it is not due, or there is one after as many images."""
        path = self.folder / checkpoint.name
        if not self.due(meta.images) or path.is_dir() or self._newest() == meta.images:
            return
        groups = {ema_group("student", length) for length in self.lengths}
        names = [name for name in meta.files if group_of(name) in groups]
        with new_folder(path) as new:
            for name in names:
                _link(checkpoint / name, new / name)
            own = meta.model_copy(update={"files": {name: meta.files[name] for name in names}}).sealed()
            store(new / "meta.json", own.model_dump_json(indent=2).encode())

    def _newest(self) -> int | None:
        """The images of the newest snapshot; None if there is none, or it is damaged, as `synthesize` will say."""
        try:
            return next((read_meta(path).images for path in complete(self.folder)), None)
        except Damaged:
            return None

    def resume(self, found: Checkpoint | None) -> None:
        """Remove the snapshots of later steps, which are made again, and make that of the checkpoint if it is due."""
        clear(self.folder)
        for path in complete(self.folder):
            if found is None or step_of(path) > found.meta.step:
                remove(path)
        if found is not None:
            self.keep(found.path, found.meta)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no links
        shutil.copyfile(source, target)


def synthesize(folder: Path, length: float, names: set[str]) -> tuple[dict[str, Tensor], int]:
    """The student's state dict with weights averaged over a length, and the number of images of the last snapshot.

    InputError if there are no snapshots, or one is damaged.

    names: of the trained weights; all other tensors are those of the last snapshot.
    """
    found = [_read(path) for path in reversed(complete(folder))]
    if not found:
        raise InputError(f"there are no snapshots in {folder} yet; wait for the first one")
    images = found[-1].meta.images
    kept = sorted({length_of_group(group_of(file)) for file in found[-1].meta.files})
    parts = [(each, width) for each in found for width in kept]
    shares = mixture([(each.meta.images, width) for each, width in parts], images, length)
    whole = found[-1].tensors(ema_group("student", kept[-1]))
    with ExitStack() as stack:
        readers = [stack.enter_context(each.group(ema_group("student", width))) for each, width in parts]
        for name in names:
            tensors = (reader[name].double() for reader in readers)
            total = sum(share * tensor for share, tensor in zip(shares, tensors, strict=True))
            assert isinstance(total, Tensor)
            whole[name] = total.to(whole[name].dtype)
    return whole, images


def _read(path: Path) -> Checkpoint:
    try:
        return verified(path)
    except Damaged as reason:
        raise InputError(
            f"snapshot {path} is damaged ({reason}), and averages of other lengths need all of them; restore it from a "
            "backup, or export a length or half-life that the checkpoints have"
        ) from reason
