"""Conditioning on class labels or on rows of a table, and no conditioning."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.protocols import Cond, Conditioning


@dataclass(frozen=True)
class ClassLabels:
    """Class ids, cond["class_labels"] [B] int64. null_class: class id of the null condition; None: there is none."""

    count: int
    null_class: int | None = None

    @property
    def has_null(self) -> bool:
        return self.null_class is not None

    def collate(self, indices: Tensor) -> Cond:
        return {"class_labels": indices}

    def null(self, cond: Cond) -> Cond:
        assert self.null_class is not None
        return {**cond, "class_labels": torch.full_like(cond["class_labels"], self.null_class)}


@dataclass(frozen=True)
class Unconditional:
    """No condition: `cond` is always empty."""

    count: None = None
    has_null: bool = False

    def collate(self, indices: Tensor) -> Cond:
        return {}

    def null(self, cond: Cond) -> Cond:
        return cond


@dataclass(frozen=True)
class ConditionTable:
    """Conditions that were computed beforehand, such as embeddings of prompts: index i has row i of each tensor.

    rows: [count, ...] by field. null_rows: [1, ...] by field, of the null condition; None: there is none.
    constants: [...] by field, equal for all samples.
    """

    rows: Mapping[str, Tensor]
    null_rows: Mapping[str, Tensor] | None = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(next(iter(self.rows.values())))

    @property
    def has_null(self) -> bool:
        return self.null_rows is not None

    def collate(self, indices: Tensor) -> Cond:
        rows = indices.cpu()
        found = {name: each[rows].to(indices.device) for name, each in self.rows.items()}
        return found | self._constants(len(indices), indices.device)

    def null(self, cond: Cond) -> Cond:
        assert self.null_rows is not None
        like = next(iter(cond.values()))
        found = {name: each.to(like.device).expand(len(like), *each.shape[1:]) for name, each in self.null_rows.items()}
        return found | self._constants(len(like), like.device)

    def _constants(self, count: int, device: torch.device) -> dict[str, Tensor]:
        return {name: each.to(device).expand(count, *each.shape) for name, each in self.constants.items()}


def of_classes(num_classes: int | None, null_class: int | None) -> Conditioning:
    """Returns the conditioning of a network with `num_classes` classes. None: an unconditional network."""
    return Unconditional() if num_classes is None else ClassLabels(num_classes, null_class)
