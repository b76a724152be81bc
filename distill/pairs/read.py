"""Reading pairs: a verified set, and a source of batches that has only a few shards open at a time.

Only the rows of a batch are read from a shard, and only their noise is drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from distill.core.errors import InputError, RunError
from distill.core.text import printable
from distill.flow import draws
from distill.flow.draws import Rows
from distill.pairs.manifest import KIND, Manifest, noise_sha256, read
from distill.pairs.paths import segment_starts
from distill.protocols import Batch, Pairs
from distill.shards import LatestShards, ShardOrder, mapped
from distill.shards import manifest as files
from distill.shards.mapped import Specs
from distill.shards.order import GROUP
from distill.shards.values import DTYPES, restored


@dataclass(frozen=True)
class Shard:
    """The tensors of a shard as they are in its file, mapped into memory: they are read when they are used."""

    data: Tensor  # [n, ...] in the stored dtype
    noise: Tensor | None  # [n, ...] float32; None: not stored
    labels: Tensor | None  # [n]; None: no classes
    states: Tensor | None  # [n, K, ...] in the stored dtype; None: not kept
    indices: range  # of the n pairs


class PairSet:
    """A complete folder of pairs.

    `open` first compares all files with their checksums, at about one gigabyte per second. Ranks that train together
    share this work.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest, self.layout = folder, manifest, manifest.layout

    @classmethod
    def open(cls, folder: Path, teacher_digest: str | None, rank: int = 0, size: int = 1) -> Self:
        """Verify the set in `folder`. InputError if it is incomplete, damaged, or made by another teacher.

        teacher_digest: digest of the teacher that must have made the pairs; None: any.
        rank, size: this process checks only the shards rank, rank + size, ..., the other `size - 1` check the rest. No
        process may use the set before all have opened it.
        """
        manifest = read(folder)
        if manifest is None:
            raise InputError(f"{folder} contains no pairs (no manifest.json); run the pairs stage first")
        layout = manifest.layout
        if not manifest.done or len(manifest.shards) < layout.files:
            raise InputError(
                f"{folder} is incomplete: {files.made(KIND, folder, manifest)} of {layout.files} shards exist; run its "
                "pairs stage again to finish it"
            )
        if teacher_digest not in (None, manifest.teacher_digest):
            raise InputError(
                f"{folder} contains pairs of another teacher: {printable(manifest.teacher[:200])}, digest "
                f"{printable(manifest.teacher_digest[:12])}, expected {str(teacher_digest)[:12]}; generate pairs with "
                "this teacher"
            )
        faults = files.faults(KIND, folder, manifest, (rank, size))
        if faults:
            raise InputError(
                f"{folder}: {files.few(faults)}; delete damaged and unknown files, then resume "
                "the run (--resume): missing shards are generated again"
            )
        if not manifest.store_noise:
            drawn = noise_sha256(manifest.seed, manifest.count, manifest.shape)
            if drawn != manifest.noise_sha256:
                raise InputError(
                    f"{folder}: on this machine, seed {manifest.seed} gives other noise than the noise of the pairs "
                    "(another numpy version?); generate the pairs again, or with their noise (store_noise: true)"
                )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def shape(self) -> tuple[int, ...]:
        return self.manifest.shape

    def load(self, number: int) -> Shard:
        """Shard `number`, mapped into memory. RunError if it cannot be read or does not fit the manifest."""
        path, indices = self.folder / self.layout.name(number), self.layout.indices(number)
        tensors = mapped.load(path, self._tensors(len(indices)))
        labels, classes = tensors.get("class_labels"), self.manifest.num_classes
        if labels is not None and classes is not None and not 0 <= labels.min() <= labels.max() < classes:
            raise RunError(f"{path} has labels outside 0 ... {classes - 1}, the classes of its manifest.json")
        return Shard(tensors["data"], tensors.get("noise"), labels, tensors.get("states"), indices)

    def fields(self, shard: Shard, rows: Tensor) -> dict[str, Tensor]:
        """The fields of `protocols.Pairs` for these rows [n] of a shard, in float32, and labels if there are any."""
        indices, data = [shard.indices[row] for row in rows.tolist()], restored(shard.data[rows])
        stored, seed = shard.noise, self.manifest.seed
        noise = draws.sample_noise(seed, indices, self.shape) if stored is None else stored[rows]
        found = {"noise": noise, "data": data}
        if shard.labels is not None:
            found["class_labels"] = shard.labels[rows]
        if shard.states is None:
            return found
        assert self.manifest.times is not None
        kept = restored(shard.states[rows])
        if self.manifest.paths == "segments":
            begin, times = segment_starts(data, noise, indices, self.manifest.times)
            states = torch.cat([begin[:, None], kept], dim=1)
        else:
            times = torch.tensor(self.manifest.times).expand(len(rows), -1)
            states = torch.cat([noise[:, None], kept, data[:, None]], dim=1)
        return found | {"states": states, "times": times}

    def _tensors(self, pairs: int) -> Specs:
        """The dtype and shape of each tensor in a shard of `pairs` pairs, by name."""
        manifest, dtype = self.manifest, DTYPES[self.manifest.dtype]
        found = {"data": (dtype, (pairs, *manifest.shape))}
        if manifest.times is not None:
            kept = 1 if manifest.paths == "segments" else len(manifest.times) - 2
            found["states"] = (dtype, (pairs, kept, *manifest.shape))
        if manifest.store_noise:
            found["noise"] = (torch.float32, (pairs, *manifest.shape))
        if manifest.num_classes is not None:
            found["class_labels"] = (torch.int64, (pairs,))
        return found


class PairSource:
    """Batches of pairs. Implements `protocols.Source`.

    The pairs form an endless stream of epochs, see `ShardOrder`. The files of at most one group are open at a time,
    whatever the size of the set. They are only a cache: any step can be asked for at any time.
    """

    def __init__(self, pairs: PairSet, batch_size: int, seed: int, group: int = GROUP) -> None:
        self.pairs, self.batch_size, self.seed, self.group = pairs, batch_size, seed, group
        layout = pairs.layout
        self._order = ShardOrder([layout.indices(i) for i in range(layout.files)], seed, "pairs", group=group)
        self._shards = LatestShards(pairs.load, group)

    @property
    def held(self) -> Mapping[int, Shard]:
        """The shards that are open, by number."""
        return self._shards.held

    def batch(self, step: int, rows: Rows) -> Batch:
        """These rows of the batch of `step`: noise and data [B, ...] float32, class_labels [B] if there are classes."""
        assert rows.total == self.batch_size
        position, stop = (step * self.batch_size + row for row in (rows.start, rows.stop))
        parts: list[dict[str, Tensor]] = []
        while position < stop:
            epoch, first = divmod(position, len(self.pairs))
            last = min(len(self.pairs), first + stop - position)
            parts += [self._gather(chosen) for chosen in self._order.take(epoch, first, last)]
            position += last - first
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        labels = found.pop("class_labels", None)
        return Batch(data=None, pairs=Pairs(**found), cond={} if labels is None else {"class_labels": labels})

    def _gather(self, chosen: Tensor) -> dict[str, Tensor]:
        """The fields of `Pairs`, and the labels if there are any, for the pairs `chosen` [n], in their order."""
        numbers = torch.div(chosen, self.pairs.manifest.shard, rounding_mode="floor")
        rows = chosen - numbers * self.pairs.manifest.shard
        different = numbers.unique().tolist()
        back = torch.argsort(torch.cat([(numbers == number).nonzero().squeeze(1) for number in different]))
        parts = [self.pairs.fields(self._shards[number], rows[numbers == number]) for number in different]
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
