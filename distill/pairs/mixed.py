"""Batches from several sources: several sets of pairs in fixed proportions, or real data together with pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.flow.draws import Rows
from distill.protocols import Batch, Pairs, Source


class Mixed:
    """Global batches with a fixed number of rows from each source. Implements `protocols.Source`.

    The rows of a source are spread evenly over the batch, so that all micro-batches of all ranks have about the same
    proportions. It has no state of its own.
    """

    def __init__(self, sources: Sequence[Source], counts: Sequence[int]) -> None:
        """counts: rows of each source in a global batch, which must be the batch size of that source."""
        self.sources, self.counts = sources, counts
        places = [((row + 0.5) / count, i) for i, count in enumerate(counts) for row in range(count)]
        self.origin = torch.tensor([source for _, source in sorted(places)])  # [B]: the source of each row

    def batch(self, step: int, rows: Rows) -> Batch:
        ours = self.origin[rows.start : rows.stop]
        batches, order = [], []
        for i, (source, count) in enumerate(zip(self.sources, self.counts, strict=True)):
            first, taken = (int((part == i).sum()) for part in (self.origin[: rows.start], ours))
            if taken:
                batches.append(source.batch(step, Rows(first, first + taken, count)))
                order.append((ours == i).nonzero().squeeze(1))
        back = torch.argsort(torch.cat(order))
        pairs = [batch.pairs for batch in batches if batch.pairs is not None]
        assert len(pairs) == len(batches), "mixed sources are all of pairs"
        noise, data = (torch.cat(each)[back] for each in ([p.noise for p in pairs], [p.data for p in pairs]))
        states, times = ([p.states for p in pairs], [p.times for p in pairs])
        cond = {name: torch.cat([batch.cond[name] for batch in batches])[back] for name in batches[0].cond}
        return Batch(None, Pairs(noise, data, _joined(states, back), _joined(times, back)), cond)


class Beside:
    """Batches with both pairs and real data. Implements `protocols.Source`."""

    def __init__(self, pairs: Source, data: Source) -> None:
        self.pairs, self.data = pairs, data

    def batch(self, step: int, rows: Rows) -> Batch:
        pairs, data = self.pairs.batch(step, rows), self.data.batch(step, rows)
        return Batch(data.data, pairs.pairs, pairs.cond, data.cond)


def _joined(parts: Sequence[Tensor | None], back: Tensor) -> Tensor | None:
    """The rows of all parts, in the order of the batch; None if a part does not have the tensor."""
    found = [part for part in parts if part is not None]
    return torch.cat(found)[back] if len(found) == len(parts) else None
