"""When checkpoints are saved and deleted, and from which one training resumes. `checkpoint_files` has their layout.

Disk space is needed for `keep` + 1 checkpoints: old ones are deleted after the new one is complete. `saving` makes the
bytes, and writes them while training continues.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from distill.core import space, versions
from distill.core.atomic import new_folder
from distill.core.errors import InputError, RunError
from distill.core.printing import say_error
from distill.spec.model import CheckpointSpec
from distill.training.checkpoint_files import (
    Checkpoint,
    Damaged,
    FileMeta,
    Meta,
    PieceMeta,
    clear,
    complete,
    ema_group,
    file_of,
    group_of,
    network_group,
    read_meta,
    remove,
    step_of,
    store,
    verify,
)
from distill.training.meeting import Meeting, MissingPartError
from distill.training.world import ALONE, World

Warn = Callable[[str], None]
WrittenGroup = tuple[str, bytes | memoryview, Mapping[str, PieceMeta]]  # name, content of the file, which parts it has


def latest(folder: Path, warn: Warn, world: World = ALONE, group: str | None = None) -> Checkpoint | None:
    """The newest checkpoint that is not damaged; None if there is no checkpoint yet. All ranks must call it.

    Damaged ones are skipped with a warning. RunError if all are damaged, so that training never silently restarts.
    Each file is read by one rank, for its checksum. group: only the files of this group are read; None: all files.
    """
    names = json.loads(world.tell("the checkpoints", json.dumps([path.name for path in complete(folder)]))[0])
    listed = [folder / name for name in names]
    damaged: dict[Path, str] = {}
    for path in listed:
        found, reason = _checked(path, world, group)
        if bad := next(filter(None, world.tell(f"the files of {path.name}", reason)), None):
            damaged[path] = bad
            continue
        assert found is not None
        for each, why in damaged.items():
            warn(f"checkpoint {each} is damaged ({why}); going back to {path.name}")
        return found
    changed = complete(folder) != listed  # a running training replaced them meanwhile
    if any(world.tell("whether the checkpoints changed", "yes" if changed else "")):
        return latest(folder, warn, world, group)
    if damaged:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in damaged.items())
        raise RunError(
            f"every checkpoint in {folder} is damaged ({reasons}); "
            "restore one from a backup, or remove that folder to start this stage again from step 0"
        )
    return None


def _checked(path: Path, world: World, group: str | None) -> tuple[Checkpoint | None, str]:
    """(the checkpoint, what is wrong with the files that this rank checks; "" if nothing is)."""
    try:
        meta = read_meta(path)
        read = sorted(name for name in meta.files if group in (None, group_of(name)))
        verify(path, meta, read[world.rank :: world.size])
    except Damaged as reason:
        return None, str(reason) or "damaged"
    return Checkpoint(path, meta), ""


def to_stderr(text: str) -> None:
    """Print a warning, for commands that show no progress."""
    say_error(f"warning: {text}")


def of_step(folder: Path, step: int, group: str) -> Checkpoint:
    """The checkpoint after `step` steps. InputError if it does not exist, or files of `group` are damaged."""
    for path in complete(folder):
        if step_of(path) == step:
            found, reason = _checked(path, ALONE, group)
            if found is None:
                raise InputError(f"checkpoint {path} is damaged ({reason}); choose another step")
            return found
    steps = ", ".join(f"step-{step_of(path)}" for path in complete(folder)) or "none yet"
    raise InputError(f"there is no checkpoint of step {step} in {folder}; available: {steps}")


def weights(
    folder: Path,
    network: str = "student",
    half_life: float | None = None,
    step: int | None = None,
    warn: Warn = to_stderr,
) -> tuple[dict[str, Tensor], int]:
    """A network's state dict from the newest checkpoint in `folder`, and the number of images it was trained for.

    The run may be in progress. InputError if there is no such checkpoint or group.

    half_life: None for the raw weights, else one of the stage's `ema_half_lives`, in images.
    step: use the checkpoint of this step instead of the newest.
    """
    group = network_group(network) if half_life is None else ema_group(network, half_life)
    found = latest(folder, warn, group=group) if step is None else of_step(folder, step, group)
    if found is None:
        raise InputError(f"no checkpoint in {folder} yet; wait for the first one, or train the stage")
    if group not in {group_of(name) for name in found.meta.files}:
        raise InputError(f"checkpoint {found.path} has no '{group}'; it has {found.groups}")
    try:
        return found.tensors(group), found.meta.images
    except FileNotFoundError:  # a running training removed it meanwhile, so there is a newer one
        return weights(folder, network, half_life, step, warn)


class Kept(Protocol):
    """Keeps parts of some checkpoints for good. All methods may raise OSError."""

    def due(self, images: int) -> bool:
        """Whether there must be a checkpoint after `images` images."""

    def keep(self, checkpoint: Path, meta: Meta) -> None:
        """Called with each checkpoint when it is complete."""

    def resume(self, found: Checkpoint | None) -> None:
        """Called with the checkpoint from which training resumes."""


class Checkpoints:
    """The checkpoints of one training: when to save, where to save, and from which one to resume.

    settings: may not change on resume.
    environment: may change on resume, but results are then not bit-identical.
    kept: what keeps parts of some checkpoints for good.
    """

    def __init__(
        self,
        folder: Path,
        spec: CheckpointSpec,
        settings: Mapping[str, object],
        environment: Mapping[str, str | int],
        warn: Warn,
        kept: "Kept | None" = None,
    ) -> None:
        self.folder, self.spec, self.warn, self._kept = folder, spec, warn, kept
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.environment = dict(environment)
        self.last: Path | None = None  # the newest complete checkpoint
        self._images, self._time, self._size = 0, time.monotonic(), 0

    def resume(self, world: World = ALONE) -> Checkpoint | None:
        """The checkpoint to resume from, or None to start from the beginning. All ranks must call it.

        Rank 0 removes what a killed process left behind. InputError if the settings differ from the checkpoint's.
        """
        found = latest(self.folder, self.warn, world)
        if found is not None:
            self._check_settings(found)
            changed = differences(found.meta.environment, self.environment)
            if changed:
                self.warn(
                    f"resuming {found.path.name} with changed settings ({'; '.join(changed)}): the result will not be "
                    "bit-identical to that of an uninterrupted run"
                )
            self.last, self._images, self._size = found.path, found.meta.images, _bytes(found.meta)
        world.alone("clearing up", partial(self._tidy, found))
        return found

    def _tidy(self, found: Checkpoint | None) -> None:
        try:
            self._clear(newer_than=None if found is None else found.meta.step)
            if self._kept is not None:
                self._kept.resume(found)
        except OSError as error:
            raise RunError(
                f"cannot delete {error.filename}: {error.strerror}; last good checkpoint: {self.last}"
            ) from error

    def require_room(self, size: int) -> None:
        """RunError unless the disk has space for all checkpoints, of `size` bytes, that exist at the same time."""
        held = len(complete(self.folder))
        left = max(self.spec.keep + 1 - held, 1)
        space.require(self.folder, left * size, f"{left} checkpoint{'s' if left > 1 else ''}")

    def warn_of_memory(self, size: int) -> None:
        """Warn if the copies of parts of a checkpoint on this host, `size` bytes (see `saving`), do not fit."""
        left = space.memory()
        if left is not None and size > left:
            self.warn(
                f"saving keeps a copy of the checkpoint, about {space.human(size)}, in the memory of this host, "
                f"but only {space.human(left)} is free there: the run may be killed at its first save. Give the job "
                "more memory, or start fewer processes on that host"
            )

    def due(self, images: int) -> bool:
        """Whether it is time to save, by the images or the minutes since the last save began."""
        by_images = self.spec.images is not None and images // self.spec.images > self._images // self.spec.images
        by_time = self.spec.minutes is not None and time.monotonic() - self._time >= 60 * self.spec.minutes
        is_kept = self._kept is not None and images > self._images and self._kept.due(images)
        return by_images or by_time or is_kept

    def began(self, images: int) -> None:
        """Note that a save after `images` images begins; `due` counts from here. Called on every rank."""
        self._images, self._time = images, time.monotonic()

    def appeared(self, step: int) -> None:
        """Note that the checkpoint of this step is complete. `write` does this too; other ranks must call it."""
        self.last = self._path(step)

    def write(self, step: int, images: int, files: Sequence[WrittenGroup], meeting: Meeting) -> None:
        """Write a checkpoint after `step` steps, completely or not at all. Then remove the oldest. For rank 0.

        RunError if writing fails; its message names the last good checkpoint.

        files: the groups of this rank. The contents may not change meanwhile. meeting: of all ranks, which write their
        own groups with `write_part`.
        """
        path = self._path(step)
        last = self.last or "none yet"
        try:
            if missing := space.shortage(self.folder, self._size):  # assumes the size of the last one
                raise RunError(f"cannot save checkpoint {path}: {missing}; last good checkpoint: {last}")
            with new_folder(path) as new:
                meeting.announce(new)
                written = _stored(new, files, meeting) | meeting.reports()
                meta = Meta(
                    format=1 if meeting.world.size == 1 else 2,
                    step=step, images=images, settings=self.settings, environment=self.environment, files=written,
                ).sealed()  # fmt: skip
                store(new / "meta.json", meta.model_dump_json(indent=2).encode())
            if self._kept is not None:
                self._kept.keep(path, meta)
        except MissingPartError as error:
            raise RunError(f"cannot save checkpoint {path}: {error}; last good checkpoint: {last}") from error
        except OSError as error:
            raise RunError(f"cannot save checkpoint {path}: {error.strerror}; last good checkpoint: {last}") from error
        self.appeared(step)
        self._size = _bytes(meta)
        try:
            self._prune()
        except OSError as error:
            raise RunError(
                f"cannot remove old checkpoints: {error.filename}: {error.strerror}; last good checkpoint: {path}"
            ) from error

    def write_part(self, files: Sequence[WrittenGroup], meeting: Meeting) -> None:
        """Write this rank's part of the checkpoint that rank 0 writes. RunError if it cannot."""
        folder = meeting.folder()
        if folder is None:
            return
        try:
            meeting.report(_stored(folder, files, meeting))
        except OSError as error:
            meeting.report({}, str(error.strerror))
            raise RunError(f"cannot save checkpoint {folder}: {error.strerror}") from error

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _clear(self, newer_than: int | None) -> None:
        """Remove what a killed process left. Checkpoints after step `newer_than` are damaged: they are moved aside."""
        clear(self.folder)
        for path in complete(self.folder):
            if newer_than is not None and step_of(path) > newer_than:
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)

    def _prune(self) -> None:
        damaged = [path for path in self.folder.iterdir() if path.name.endswith(".damaged")]
        for path in (*complete(self.folder)[self.spec.keep :], *damaged):
            remove(path)

    def _check_settings(self, found: Checkpoint) -> None:
        if "draws" in self.settings:
            versions.require_same_draws(found.meta.settings.get("draws", 1), f"checkpoint {found.path}")
        changed = differences(found.meta.settings, self.settings)
        if changed:
            raise InputError(
                f"checkpoint {found.path} was trained with other settings: {'; '.join(changed)}; "
                "restore the old ones, or start a new run"
            )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The differences between two JSON objects, each as "path: X -> Y"."""
    out = []
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            out += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            out.append(f"{prefix}{name}: {json.dumps(before)} -> {json.dumps(after)}")
    return out


def _stored(folder: Path, files: Sequence[WrittenGroup], meeting: Meeting) -> dict[str, FileMeta]:
    """Write the files of this rank; returns what meta.json says of them."""
    found: dict[str, FileMeta] = {}
    for group, content, pieces in files:
        name = file_of(group, meeting.world.rank, meeting.world.size)
        found[name] = store(folder / name, content).model_copy(update={"pieces": dict(pieces)})
    return found


def _bytes(meta: Meta) -> int:
    return sum(file.size for file in meta.files.values())
