"""Batches from several sources: pair sets in fixed parts, and real data beside pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.flow.draws import Rows
from distill.protocols import Batch, Pairs, Source


class Mixed:
    """Every global batch holds a fixed number of rows of each source, spread evenly over it, so that every micro-batch
    of every rank holds about the same of each. Stateless as its sources are. Fits `protocols.Source`.
    """

    def __init__(self, sources: Sequence[Source], counts: Sequence[int]) -> None:
        """counts: rows of each source in a batch, which is the size of that source's own batches."""
        self.sources, self.counts = sources, counts
        places = [((row + 0.5) / count, i) for i, count in enumerate(counts) for row in range(count)]
        self.origin = torch.tensor([source for _, source in sorted(places)])  # [B]: which source each row is of

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
    """Pairs, and beside them real data. Fits `protocols.Source`."""

    def __init__(self, pairs: Source, data: Source) -> None:
        self.pairs, self.data = pairs, data

    def batch(self, step: int, rows: Rows) -> Batch:
        pairs, data = self.pairs.batch(step, rows), self.data.batch(step, rows)
        return Batch(data.data, pairs.pairs, pairs.cond, data.cond)


def _joined(parts: Sequence[Tensor | None], back: Tensor) -> Tensor | None:
    """Rows of all parts in the order of the batch; None where some have no such tensor."""
    found = [part for part in parts if part is not None]
    return torch.cat(found)[back] if len(found) == len(parts) else None
