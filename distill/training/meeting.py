"""How the threads in which all ranks write one checkpoint together meet: through the store of the processes.

Collectives are not used: those of the training loop would meet them in another order on another rank.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event

from distill.core.errors import RunError
from distill.training.checkpoint_files import FileMeta
from distill.training.world import PATIENCE, POLL, World


class MissingPartError(RunError):
    """Another rank has not written its part of a checkpoint."""


class Meeting:
    """The meeting for one checkpoint. Rank 0 makes its folder; the others write their files there and report them.

    number: one that all ranks use for this checkpoint alone. given_up: set when the process ends and waits no longer.
    """

    def __init__(self, world: World, number: int, given_up: Event) -> None:
        self.world, self._given_up = world, given_up
        self._key = f"save {number}"

    def announce(self, folder: Path | None) -> None:
        """Rank 0: say where to write. None: the checkpoint will not be written."""
        if self.world.store is not None:
            self.world.store.set(f"{self._key} folder", b"" if folder is None else str(folder).encode())

    def folder(self) -> Path | None:
        """The other ranks: where to write; None: nowhere, since rank 0 could not make the folder."""
        found = self._wait("folder")
        return Path(found) if found else None

    def report(self, files: Mapping[str, FileMeta], error: str = "") -> None:
        """The other ranks: the files that were written, or why they were not."""
        assert self.world.store is not None
        content = {"error": error, "files": {name: each.model_dump() for name, each in files.items()}}
        self.world.store.set(f"{self._key} rank {self.world.rank}", json.dumps(content).encode())

    def reports(self) -> dict[str, FileMeta]:
        """Rank 0: the files of all other ranks. MissingPartError if one of them could not write."""
        found: dict[str, FileMeta] = {}
        for rank in range(1, self.world.size):
            said = json.loads(self._wait(f"rank {rank}"))
            if said["error"]:
                raise MissingPartError(f"rank {rank}: {said['error']}")
            found |= {name: FileMeta.model_validate(each) for name, each in said["files"].items()}
        return found

    def _wait(self, what: str) -> str:
        """The value of a key, which is then removed if only this rank reads it."""
        store, key = self.world.store, f"{self._key} {what}"
        assert store is not None
        deadline = time.monotonic() + PATIENCE * self.world.timeout.total_seconds()
        while not store.check([key]):  # `get` would keep the training loop from using the store while it waits
            if self._given_up.is_set() or time.monotonic() > deadline:
                raise MissingPartError("another rank has not written its part of the checkpoint")
            time.sleep(POLL)
        found = store.get(key).decode()
        if what.startswith("rank "):
            store.delete_key(key)
        return found
