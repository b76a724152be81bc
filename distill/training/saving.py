"""Saving while training continues: training waits until its tensors are copied; a thread writes the copy to disk.

The copy is kept until the next save, so that it costs no new memory: rank 0 holds one whole checkpoint in the host's
memory (`Roles.checkpoint_bytes`) from its first save to the end of training.
"""

import json
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from types import TracebackType
from typing import Self

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from distill.core import space
from distill.core.errors import PeerLost, RunError
from distill.training.checkpoint import Checkpoints, Group
from distill.training.world import ALONE, World


class Image:
    """The bytes of a safetensors file, kept in memory: tensors are copied straight into their places in it.

    They are the very bytes that the library would write, but need no second copy to be written.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # The library names the types and chooses the order; of empty tensors, as it wants to copy what it is given.
        empty = to_bytes({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()})
        header, size = json.loads(empty[8:]), 0
        for name, entry in header.items():
            begin, size = size, size + tensors[name].nbytes
            entry |= {"shape": list(tensors[name].shape), "data_offsets": [begin, size]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // 8) * 8)  # the data begins at a multiple of 8 bytes
        start = 8 + len(text)
        self._bytes = _host_memory(start + size, pinned=any(tensor.is_cuda for tensor in tensors.values()))
        self.content = memoryview(self._bytes.numpy())
        self.content[:start] = len(text).to_bytes(8, "little") + text
        self._places: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            begin, end = header[name]["data_offsets"]
            self._places[name] = self._bytes[start + begin : start + end].view(tensor.dtype).view(tensor.shape)

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these have the names, types and shapes of those that it was made for."""
        return _layout(self._places) == _layout(tensors)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy them in; what lies on a GPU is there once the GPU has been waited for."""
        for name, tensor in tensors.items():
            self._places[name].copy_(tensor, non_blocking=tensor.is_cuda)


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _host_memory(size: int, *, pinned: bool) -> Tensor:
    """uint8 [size]. pinned: a GPU can write to it by itself, at the full speed of the bus.

    Torch's own pinned memory would be rounded up to a power of two, and never given back.
    """
    try:
        found = torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:
        raise RunError(
            f"no memory for the copy of a checkpoint that is written while training continues: {space.human(size)} "
            "more are needed on the host of rank 0"
        ) from error
    if pinned:
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(found.data_ptr(), size, 1)):  # 1: for all GPUs of the process
            with suppress(RuntimeError):  # CUDA keeps the failure, and the next kernel that is started would raise it
                torch.ones(1, device="cuda").add_(1)
            return found  # copied to by the CPU, which is slower
        weakref.finalize(found, runtime.cudaHostUnregister, found.data_ptr()).atexit = False
    return found


@dataclass(frozen=True)
class Saved:
    """A save that is done."""

    step: int
    images: int
    seconds: float
    """from when it was due until all of it was on the disk"""
    standstill: float
    """seconds of these that training waited: for the save before, and until its tensors were copied"""


@dataclass
class _Writing:
    """A save that is not done yet. On other ranks than the first it has no thread."""

    step: int
    images: int
    due: float
    standstill: float = 0.0
    thread: Thread | None = None
    ended: float = 0.0
    error: RunError | None = None


class Saver:
    """Makes the saves of a training: one at a time, on all ranks together. While it is entered, whatever ends training
    waits for the save that is being written. A second Ctrl-C ends at once: that save is lost, as with kill -9, and the
    one before it counts. So it may be where another rank has failed, as the launcher ends this one within seconds.

    note: called with each completed save, on rank 0, in the thread of training.
    """

    def __init__(self, checkpoints: Checkpoints, note: Callable[[Saved], None], world: World = ALONE) -> None:
        self.checkpoints, self.world, self._note = checkpoints, world, note
        self.images: dict[str, Image] = {}  # of the last save, by group
        self._writing: _Writing | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None and not issubclass(kind, KeyboardInterrupt):
            self._warn_of(self._outcome())

    def save(self, step: int, images: int, groups: Iterable[Group]) -> None:
        """Copy the tensors of `groups`, and write them while the caller continues. Every rank must call it.

        A save that is still being written is waited for. RunError if that one has failed.
        """
        writing = _Writing(step, images, time.monotonic())
        self.finish()
        self.checkpoints.began(images)
        with self.world.contact(f"after step {step}, gathering for a checkpoint"):
            if self.world.first:
                self._copy(groups)
            else:
                for _ in groups:  # its part of what all ranks gather
                    pass
        if self.world.first:
            # A daemon: a process that is to end at once need not wait for the disk.
            writing.thread = Thread(target=self._write, args=(writing,), name="saving", daemon=True)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread takes them all
            writing.thread.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        writing.standstill = time.monotonic() - writing.due
        self._writing = writing

    def look(self) -> None:
        """Note a save that has become done since the last look; waits for nothing. RunError if it has failed."""
        writing = self._writing
        if writing is None or writing.thread is None or writing.thread.is_alive():
            return
        if (error := self._outcome()) is not None:
            raise error

    def finish(self) -> None:
        """Wait for the save that is being written. Every rank must call it. RunError if it has failed."""
        if (error := self._settled()) is not None:
            raise error

    def last_good(self) -> str:
        """The newest checkpoint that is complete, for messages: `finish`, but a failed save is only a warning."""
        self._warn_of(self._settled())
        return str(self.checkpoints.last or "none yet")

    def _settled(self) -> RunError | PeerLost | None:
        """Why the last save has failed; None on all ranks, once it is complete."""
        error: RunError | PeerLost | None = self.world.alone("waiting for the last save", self._outcome)
        [failed] = self.world.meet("after the last save", error is not None)
        if failed and not self.world.first:
            error = PeerLost(f"rank {self.world.rank}: rank 0 could not save")
        if self._writing is not None and not failed:
            self.checkpoints.appeared(self._writing.step)
        self._writing = None
        return error

    def _outcome(self) -> RunError | None:
        """Waits for the thread that writes; why the save has failed."""
        writing = self._writing
        if writing is None or writing.thread is None:
            return None
        writing.thread.join()
        self._writing = None
        if writing.error is None:
            seconds = (writing.ended - writing.due, writing.standstill)
            self._note(Saved(writing.step, writing.images, *(round(each, 3) for each in seconds)))
        return writing.error

    def _warn_of(self, error: RunError | PeerLost | None) -> None:
        if isinstance(error, RunError):
            self.checkpoints.warn(str(error))

    def _copy(self, groups: Iterable[Group]) -> None:
        """One group at a time, as each may have been gathered for this alone."""
        kept, self.images, devices = self.images, {}, set[torch.device]()
        for group, tensors in groups:
            image = kept.pop(group, None)
            if image is None or not image.fits(tensors):
                image = None  # its memory goes first
                image = Image(tensors)
            image.fill(tensors)
            self.images[group] = image
            devices |= {tensor.device for tensor in tensors.values() if tensor.is_cuda}
            del tensors  # before the next ones are gathered
        for device in devices:
            torch.cuda.synchronize(device)

    def _write(self, writing: _Writing) -> None:
        writing.error = RunError(f"cannot save step {writing.step}: its thread failed, as the traceback above says")
        try:
            self.checkpoints.write(
                writing.step, writing.images, [(group, image.content) for group, image in self.images.items()]
            )
            writing.error = None
        except RunError as error:
            writing.error = error
        writing.ended = time.monotonic()
