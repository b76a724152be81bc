"""What each rank saves of a group of tensors: some of them whole, and parts of others."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from distill.training.checkpoint_files import PieceMeta


@dataclass(frozen=True)
class RankParts:
    """Tensors by name. Those in `pieces` are parts of a tensor: elements of it, flattened, from `start` on."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    pieces: Mapping[str, PieceMeta] = field(default_factory=dict)

    def __or__(self, other: "RankParts") -> "RankParts":
        return RankParts({**self.tensors, **other.tensors}, {**self.pieces, **other.pieces})


TensorGroup = tuple[str, RankParts]  # name of the group, and this rank's parts of it


def share_of(tensors: Mapping[str, Tensor], rank: int, size: int) -> RankParts:
    """The share of one of `size` ranks of tensors that all of them have whole: about the same bytes for each rank."""
    if size == 1:
        return RankParts(tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    begin, end, at = rank * total // size, (rank + 1) * total // size, 0
    kept: dict[str, Tensor] = {}
    pieces: dict[str, PieceMeta] = {}
    for name, tensor in tensors.items():
        first, last = (min(max(edge - at, 0), tensor.nbytes) // tensor.element_size() for edge in (begin, end))
        at += tensor.nbytes
        if last - first == tensor.numel():
            if tensor.numel() or rank == 0:
                kept[name] = tensor
        elif last > first:
            kept[name] = tensor.reshape(-1)[first:last]
            pieces[name] = PieceMeta(start=first, shape=list(tensor.shape))
    return RankParts(kept, pieces)
