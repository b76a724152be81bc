"""Saves checkpoints while training continues: training waits only until its tensors are copied; a thread writes them.

Each rank copies and writes its own parts. The memory of the copy is reused by the next save, so all ranks together need
memory for one whole checkpoint (`Roles.checkpoint_bytes`), from the first save to the end of training.
"""

import json
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Thread
from types import TracebackType
from typing import Self

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from distill.core import space
from distill.core.errors import PeerLost, RunError
from distill.training.checkpoint import Checkpoints, WrittenGroup
from distill.training.meeting import Meeting
from distill.training.parts import TensorGroup
from distill.training.world import ALONE, POLL, World

ALIGNMENT = 64  # bytes; a cache line
PEERS = 5.0  # seconds for which a rank that ends waits for the others to write their parts


class Image:
    """The bytes of a safetensors file in memory. Tensors are copied directly to their places in it.

    The bytes are the same as those that the safetensors library writes, but the library would need a second copy.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # The library determines the dtype names and the order. It is given empty tensors, because it copies its input.
        empty = to_bytes({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()})
        header, size = json.loads(empty[8:]), 0
        for name, entry in header.items():
            begin, size = size, size + tensors[name].nbytes
            entry |= {"shape": list(tensors[name].shape), "data_offsets": [begin, size]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // 8) * 8)  # the data must start at a multiple of 8 bytes in the file
        start = 8 + len(text)
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        self._memory = _host_memory(start + size + ALIGNMENT, pinned=pinned)
        # Data at other addresses would be copied 1.25 times slower.
        skipped = -(self._memory.data_ptr() + start) % ALIGNMENT
        whole = self._memory[skipped : skipped + start + size]
        self.content = memoryview(whole.numpy())
        self.content[:start] = len(text).to_bytes(8, "little") + text
        self._places: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            begin, end = header[name]["data_offsets"]
            self._places[name] = whole[start + begin : start + end].view(tensor.dtype).view(tensor.shape)

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether `tensors` have the same names, dtypes and shapes as those that this image was made for."""
        return _layout(self._places) == _layout(tensors)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors into the image. Copies from a GPU are asynchronous: synchronize before using them."""
        for name, tensor in tensors.items():
            self._places[name].copy_(tensor, non_blocking=tensor.is_cuda)


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _host_memory(size: int, *, pinned: bool) -> Tensor:
    """uint8 [size] in host memory. RunError if there is not enough.

    pinned: page-locked, so that a GPU can write to it at full speed. torch's own pinned memory is not used: its size is
    rounded up to a power of two, and it is never freed.
    """
    try:
        found = torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:
        raise RunError(
            "not enough memory on this host for a copy of a rank's part of the checkpoint, which is written while "
            f"training continues: {space.human(size)} more needed"
        ) from error
    if pinned:
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(found.data_ptr(), size, 1)):  # 1: for all GPUs of the process
            with suppress(RuntimeError):  # clears the error that CUDA keeps: the next kernel would raise it
                torch.ones(1, device="cuda").add_(1)
            return found  # not pinned: copies are slower
        weakref.finalize(found, runtime.cudaHostUnregister, found.data_ptr()).atexit = False
    return found


@dataclass(frozen=True)
class Saved:
    """A completed save."""

    step: int
    images: int
    seconds: float
    """time from the start of the save until the checkpoint was on the disk"""
    standstill: float
    """the part of `seconds` for which training waited: for the previous save, and for the copy of its tensors"""


@dataclass
class _Writing:
    """A save in progress."""

    step: int
    images: int
    due: float
    standstill: float = 0.0
    thread: Thread | None = None
    ended: float = 0.0
    error: RunError | None = None

    @property
    def is_going_on(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class Saver:
    """Makes the saves of a training, one at a time, on all ranks together.

    Use it as a context manager: if training ends with an exception, the save in progress is completed first. Two cases
    can interrupt it: a second Ctrl-C, and the failure of another rank, after which the launcher ends this process
    within seconds. Then the previous checkpoint remains the newest, as after kill -9.

    note: called with each completed save, on rank 0, in the training thread.
    """

    def __init__(self, checkpoints: Checkpoints, note: Callable[[Saved], None], world: World = ALONE) -> None:
        self.checkpoints, self.world, self._note = checkpoints, world, note
        self.images: dict[str, Image] = {}  # of the last save, by group; reused by the next
        self._writing: _Writing | None = None
        self._given_up = Event()  # the other ranks are not waited for any more

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            return
        if issubclass(kind, PeerLost):
            if self._writing is not None and self._writing.thread is not None:
                self._writing.thread.join(PEERS)
            self._given_up.set()
        self._warn_of(self._outcome())

    def save(self, step: int, images: int, groups: Iterable[TensorGroup]) -> None:
        """Copy the tensors of `groups`, and write them while the caller continues. Every rank must call it.

        Waits first for the previous save. RunError if that one has failed.
        """
        writing = _Writing(step, images, time.monotonic())
        self.finish()
        self.checkpoints.began(images)
        with self.world.contact(f"after step {step}, gathering for a checkpoint"):
            files = self._copy(groups)
        meeting = Meeting(self.world, next(self.world.works), self._given_up)
        # A daemon thread, so that a process that must end at once does not wait for the disk.
        writing.thread = Thread(target=self._write, args=(writing, files, meeting), name="saving", daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # leaves them to the main thread
        writing.thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        writing.standstill = time.monotonic() - writing.due
        self._writing = writing

    @property
    def has_failed(self) -> bool:
        """Whether a save of this rank has failed, as `look` will say."""
        writing = self._writing
        return writing is not None and writing.thread is not None and not writing.is_going_on and bool(writing.error)

    def look(self) -> None:
        """Note a save that was completed since the last call. Does not wait. RunError if the save has failed."""
        writing = self._writing
        if writing is None or writing.is_going_on:
            return
        if (error := self._outcome()) is not None:
            raise error

    def finish(self) -> None:
        """Wait for the save in progress. Every rank must call it.

        If the save has failed, this raises RunError on rank 0 and on the rank that could not write its part, and
        PeerLost on the others.
        """
        if (error := self._settled()) is not None:
            raise error

    def last_good(self) -> str:
        """The newest complete checkpoint, for messages. Waits like `finish`, but only warns of a failed save."""
        self._warn_of(self._settled())
        return str(self.checkpoints.last or "none yet")

    def _settled(self) -> RunError | PeerLost | None:
        """Wait for the save in progress. Returns its error, or None on all ranks if it is complete."""
        writing = self._writing
        # Not only this rank's thread is waited for: a rank that has ended is noticed in `meet`.
        while self.world.meet("waiting for the last save", writing is not None and writing.is_going_on)[0]:
            time.sleep(POLL)
        error: RunError | PeerLost | None = self._outcome()
        [failed] = self.world.meet("after the last save", error is not None)
        if failed and error is None:
            error = PeerLost(f"rank {self.world.rank}: another rank could not save")
        if writing is not None and not failed:
            self.checkpoints.appeared(writing.step)
        self._writing = None
        return error

    def _outcome(self) -> RunError | None:
        """Wait for the writing thread of this rank, if any. Returns the error of the save, once, or None."""
        writing = self._writing
        if writing is None or writing.thread is None:
            return None
        writing.thread.join()
        writing.thread = None
        if writing.error is None and self.world.first:
            seconds = (writing.ended - writing.due, writing.standstill)
            self._note(Saved(writing.step, writing.images, *(round(each, 3) for each in seconds)))
        return writing.error

    def _warn_of(self, error: RunError | PeerLost | None) -> None:
        if isinstance(error, RunError):
            self.checkpoints.warn(str(error))

    def _copy(self, groups: Iterable[TensorGroup]) -> list[WrittenGroup]:
        """Copy one group at a time: tensors may have been gathered from all ranks just for this."""
        kept, self.images, devices = self.images, {}, set[torch.device]()
        files: list[WrittenGroup] = []
        for group, parts in groups:
            tensors = parts.tensors
            image = kept.pop(group, None)
            if image is None or not image.fits(tensors):
                image = None  # free its memory first
                image = Image(tensors)
            image.fill(tensors)
            self.images[group] = image
            files.append((group, image.content, parts.pieces))
            devices |= {tensor.device for tensor in tensors.values() if tensor.is_cuda}
            del tensors, parts  # before the next ones are gathered
        for device in devices:
            torch.cuda.synchronize(device)
        return files

    def _write(self, writing: _Writing, files: list[WrittenGroup], meeting: Meeting) -> None:
        writing.error = RunError(
            f"cannot save step {writing.step}: the thread that writes it failed; see the traceback above"
        )
        try:
            if self.world.first:
                self.checkpoints.write(writing.step, writing.images, files, meeting)
            else:
                self.checkpoints.write_part(files, meeting)
            writing.error = None
        except RunError as error:
            writing.error = error
        finally:
            if self.world.first and writing.error is not None:
                meeting.announce(None)  # if there is no folder yet, the others need not wait for it
        writing.ended = time.monotonic()
