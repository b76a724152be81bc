"""Reading pairs: a verified set, and a source of batches that has only a few shards open at a time.

Only the rows of a batch are read from a shard, and only their noise is drawn.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distill.core.errors import InputError, RunError
from distill.core.text import printable
from distill.flow import draws
from distill.flow.draws import Rows
from distill.pairs.manifest import Manifest, fault, few, foreign, noise_sha256, read, records
from distill.pairs.numbers import DTYPES, restored
from distill.pairs.paths import segment_starts
from distill.protocols import Batch, Pairs


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
            made = manifest.shards.keys() | records(folder, layout)[0].keys()
            raise InputError(
                f"{folder} is incomplete: {len(made)} of {layout.files} shards exist; run its pairs stage again to "
                "finish it"
            )
        if teacher_digest not in (None, manifest.teacher_digest):
            raise InputError(
                f"{folder} contains pairs of another teacher: {printable(manifest.teacher[:200])}, digest "
                f"{printable(manifest.teacher_digest[:12])}, expected {str(teacher_digest)[:12]}; generate pairs with "
                "this teacher"
            )
        names = [layout.name(number) for number in layout.part((rank, size))]
        faults = [f"{name} is {wrong}" for name in names if (wrong := fault(folder / name, manifest.shards[name]))]
        if rank == 0:
            faults += [f"{name} does not belong to this set" for name in foreign(folder, manifest)]
        if faults:
            raise InputError(
                f"{folder}: {few(faults)}; delete damaged and unknown files, then resume "
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
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{path} was complete at the start, but cannot be read now: {error}") from error
        found = {name: (values.dtype, tuple(values.shape)) for name, values in tensors.items()}
        expected = self._tensors(len(indices))
        if found != expected:
            raise RunError(f"{path} contains {_told(found)}, but its manifest.json lists {_told(expected)}")
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

    def _tensors(self, pairs: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
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


def _told(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    return printable(", ".join(f"{n} {str(d)[6:]} {list(shape)}" for n, (d, shape) in sorted(tensors.items())))


@dataclass(frozen=True)
class ShardGroup:
    """Some shards of an epoch, and the order of their pairs."""

    shards: list[int]
    order: Tensor  # [n, 2] int64: (shard, row) of each pair


class PairSource:
    """Batches of pairs. Implements `protocols.Source`.

    The pairs form an endless stream of epochs, each of which contains every pair once. For an epoch the shards are
    shuffled and cut into groups of `group`, and the pairs are shuffled within each group. The files of at most one
    group are open at a time, whatever the size of the set. They are only a cache: any step can be asked for at any
    time.
    """

    def __init__(self, pairs: PairSet, batch_size: int, seed: int, group: int = 4) -> None:
        self.pairs, self.batch_size, self.seed, self.group = pairs, batch_size, seed, group
        self.held: dict[int, Shard] = {}
        self._layout: tuple[int, list[list[int]], list[int]] = (-1, [], [])  # epoch, its groups, their first positions
        self._group: tuple[int, int, ShardGroup] | None = None  # epoch, number of the group, group

    def batch(self, step: int, rows: Rows) -> Batch:
        """These rows of the batch of `step`: noise and data [B, ...] float32, class_labels [B] if there are classes."""
        assert rows.total == self.batch_size
        position, stop = (step * self.batch_size + row for row in (rows.start, rows.stop))
        parts: list[dict[str, Tensor]] = []
        while position < stop:
            group, offset = self._find(position)
            chosen = group.order[offset : offset + stop - position]
            parts.append(self._gather(group, chosen))
            position += len(chosen)
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        labels = found.pop("class_labels", None)
        return Batch(data=None, pairs=Pairs(**found), cond={} if labels is None else {"class_labels": labels})

    def _find(self, position: int) -> tuple[ShardGroup, int]:
        """The group that contains a position of the stream, and the place in its order."""
        epoch, offset = divmod(position, len(self.pairs))
        if self._layout[0] != epoch:
            shards = draws.permutation(self.pairs.layout.files, self.seed, "pairs", epoch, "shards").tolist()
            groups = [shards[i : i + self.group] for i in range(0, len(shards), self.group)]
            starts = list(accumulate((sum(map(self._pairs, group)) for group in groups), initial=0))
            self._layout = epoch, groups, starts
        _, groups, starts = self._layout
        number = bisect_right(starts, offset) - 1
        if self._group is None or self._group[:2] != (epoch, number):
            sizes = [self._pairs(shard) for shard in groups[number]]
            of_shard = torch.tensor(groups[number]).repeat_interleave(torch.tensor(sizes))
            rows = torch.stack([of_shard, torch.cat([torch.arange(size) for size in sizes])], dim=1)
            order = rows[draws.permutation(len(rows), self.seed, "pairs", epoch, number)]
            self._group = epoch, number, ShardGroup(groups[number], order)
        return self._group[2], offset - starts[number]

    def _pairs(self, shard: int) -> int:
        return len(self.pairs.layout.indices(shard))

    def _gather(self, group: ShardGroup, chosen: Tensor) -> dict[str, Tensor]:
        """The fields of `Pairs`, and the labels if there are any, for the rows `chosen` [n, 2], in their order."""
        self.held = {number: shard for number, shard in self.held.items() if number in group.shards}  # frees memory
        numbers = chosen[:, 0].unique().tolist()
        back = torch.argsort(torch.cat([(chosen[:, 0] == number).nonzero().squeeze(1) for number in numbers]))
        parts = []
        for number in numbers:
            if number not in self.held:
                self.held[number] = self.pairs.load(number)
            parts.append(self.pairs.fields(self.held[number], chosen[chosen[:, 0] == number, 1]))
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
