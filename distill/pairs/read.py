"""Reading pairs: a verified set, and a source of batches that holds a few shards at a time."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distill import draws
from distill.draws import Rows
from distill.guard import InputError, RunError
from distill.pairs.manifest import Manifest, fault, foreign, noise_sha256, read
from distill.pairs.numbers import restored
from distill.pairs.paths import segment_starts
from distill.protocols import Batch, Pairs


@dataclass(frozen=True)
class Shard:
    """Consecutive pairs `indices`: noise [n, ...] float32, data [n, ...] in the stored dtype, labels [n] or None, and
    where states are kept, those of the file [n, K, ...] in the stored dtype.
    """

    noise: Tensor
    data: Tensor
    labels: Tensor | None
    states: Tensor | None
    indices: range


class PairSet:
    """A complete folder of pairs. `open` reads every byte once to compare checksums (about a second per gigabyte)."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.names = list(manifest.layout())
        self.sizes = [len(indices) for indices in manifest.layout().values()]

    @classmethod
    def open(cls, folder: Path, teacher_digest: str | None) -> Self:
        """The set in `folder`, verified; `teacher_digest`: whose pairs they must be, None if anybody's will do."""
        manifest = read(folder)
        if manifest is None:
            raise InputError(f"{folder} holds no pairs (no manifest.json); run the pairs stage first")
        if not manifest.done or manifest.shards.keys() != manifest.layout().keys():
            raise InputError(
                f"{folder} is incomplete, {len(manifest.shards)} of {len(manifest.layout())} shards; "
                "run its pairs stage again to finish it"
            )
        if teacher_digest not in (None, manifest.teacher_digest):
            raise InputError(
                f"{folder} holds pairs of another teacher: {manifest.teacher}, digest {manifest.teacher_digest[:12]}, "
                f"not {str(teacher_digest)[:12]}; make pairs of this teacher"
            )
        files = manifest.shards.items()
        faults = [f"{name} is {wrong}" for name, file in files if (wrong := fault(folder / name, file))]
        faults += [f"{name} is not of this set" for name in foreign(folder, manifest)]
        if faults:
            raise InputError(
                f"{folder}: {', '.join(faults)}; delete what is damaged or foreign and go on with the run (--resume): "
                "what is missing is made again"
            )
        drawn = noise_sha256(manifest.seed, manifest.count, manifest.shape)
        if not manifest.store_noise and drawn != manifest.noise_sha256:
            raise InputError(
                f"{folder}: this machine draws other noise from seed {manifest.seed} than the pairs were solved from "
                "(another numpy?); make the pairs again, or store their noise (store_noise: true)"
            )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def shape(self) -> tuple[int, ...]:
        return self.manifest.shape

    def load(self, number: int) -> Shard:
        """Shard `number`, read whole, and its noise, drawn again."""
        path = self.folder / self.names[number]
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{path} was complete at the start and cannot be read now: {error}") from error
        indices = self.manifest.layout()[self.names[number]]
        drawn = None if "noise" in tensors else draws.sample_noise(self.manifest.seed, indices, self.shape)
        noise = tensors["noise"] if drawn is None else drawn
        return Shard(noise, tensors["data"], tensors.get("class_labels"), tensors.get("states"), indices)

    def fields(self, shard: Shard, rows: Tensor) -> dict[str, Tensor]:
        """The fields of `protocols.Pairs` of these rows [n] of a shard, in float32, and labels if there are any."""
        noise, data = shard.noise[rows], restored(shard.data[rows])
        found = {"noise": noise, "data": data}
        if shard.labels is not None:
            found["class_labels"] = shard.labels[rows]
        if shard.states is None:
            return found
        assert self.manifest.times is not None
        kept = restored(shard.states[rows])
        if self.manifest.paths == "segments":
            first = torch.tensor(shard.indices)[rows].tolist()
            begin, times = segment_starts(data, noise, first, self.manifest.times)
            states = torch.cat([begin[:, None], kept], dim=1)
        else:
            times = torch.tensor(self.manifest.times).expand(len(rows), -1)
            states = torch.cat([noise[:, None], kept, data[:, None]], dim=1)
        return found | {"states": states, "times": times}


@dataclass(frozen=True)
class Group:
    """Some shards of an epoch, and the order in which their pairs come."""

    shards: list[int]
    order: Tensor  # [n, 2] int64: shard, row


class PairSource:
    """Batches of pairs. Position p of the stream is in epoch p // len(pairs), in which every pair comes once.

    An epoch permutes the shards, cuts them into groups, and permutes the pairs within a group. At most one group is in
    memory, whatever the size of the set. Stateless but for that cache: any step can be asked for at any time.
    Fits `protocols.Source`.
    """

    def __init__(self, pairs: PairSet, batch_size: int, seed: int, group: int = 4) -> None:
        self.pairs, self.batch_size, self.seed, self.group = pairs, batch_size, seed, group
        self.held: dict[int, Shard] = {}
        self._layout: tuple[int, list[list[int]], list[int]] = (-1, [], [])  # epoch, its groups, where they start
        self._group: tuple[int, int, Group] | None = None  # epoch, number, group

    def batch(self, step: int, rows: Rows) -> Batch:
        """These rows of step's batch: noise and data [B, ...] float32, class_labels [B] if there are classes."""
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

    def _find(self, position: int) -> tuple[Group, int]:
        """The group that position is in, and where in its order."""
        epoch, offset = divmod(position, len(self.pairs))
        if self._layout[0] != epoch:
            shards = draws.permutation(len(self.pairs.sizes), self.seed, "pairs", epoch, "shards").tolist()
            groups = [shards[i : i + self.group] for i in range(0, len(shards), self.group)]
            starts = list(accumulate((sum(self.pairs.sizes[s] for s in group) for group in groups), initial=0))
            self._layout = epoch, groups, starts
        _, groups, starts = self._layout
        number = bisect_right(starts, offset) - 1
        if self._group is None or self._group[:2] != (epoch, number):
            rows = [(shard, row) for shard in groups[number] for row in range(self.pairs.sizes[shard])]
            order = torch.tensor(rows)[draws.permutation(len(rows), self.seed, "pairs", epoch, number)]
            self._group = epoch, number, Group(groups[number], order)
        return self._group[2], offset - starts[number]

    def _gather(self, group: Group, chosen: Tensor) -> dict[str, Tensor]:
        """The fields of `Pairs`, and labels if there are any, of the chosen (shard, row) [n, 2], in that order."""
        self.held = {number: shard for number, shard in self.held.items() if number in group.shards}  # before loading
        numbers = chosen[:, 0].unique().tolist()
        back = torch.argsort(torch.cat([(chosen[:, 0] == number).nonzero().squeeze(1) for number in numbers]))
        parts = []
        for number in numbers:
            if number not in self.held:
                self.held[number] = self.pairs.load(number)
            parts.append(self.pairs.fields(self.held[number], chosen[chosen[:, 0] == number, 1]))
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
