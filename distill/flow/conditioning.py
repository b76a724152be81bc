"""Conditioning on class labels, and no conditioning. Other kinds can implement `protocols.Conditioning`."""

from dataclasses import dataclass

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


def of_classes(num_classes: int | None, null_class: int | None) -> Conditioning:
    """Returns the conditioning of a network with `num_classes` classes. None: an unconditional network."""
    return Unconditional() if num_classes is None else ClassLabels(num_classes, null_class)
