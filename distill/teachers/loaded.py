"""A teacher, loaded: a frozen velocity field and what must be known to use it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.flow.fields import Guided
from distill.protocols import Cond, VelocityField


@dataclass(frozen=True)
class LoadedTeacher:
    """What every kind of teacher becomes. Fits `protocols.Teacher`."""

    field: VelocityField
    shape: tuple[int, ...]  # of one sample
    num_classes: int | None  # real classes; None: unconditional
    null_class: int | None  # class id of the unconditional call; None: guidance is refused
    digest: str  # sha256 over configuration and weights
    description: str  # one line for people
    network: nn.Module | None = None  # the ModelMixin behind a checkpoint; None: closed form
    exact_data: Callable[[int, Sequence[int]], Tensor] | None = None  # (seed, indices) -> exact samples
    guidance_scale: float = 1.0  # classifier-free guidance that the network was trained to contain; 1: none
    unconditional: bool = True  # whether the null class, if there is one, was trained
    license: str = ""  # its terms, which pass on to its students; empty: not known

    def null(self, cond: Cond) -> Cond:
        """The condition of the unconditional call, for as many rows as `cond` has."""
        if self.null_class is None:
            raise InputError(
                f"{self.description} has no unconditional call, so it cannot be guided; "
                "use guidance_scale: 1, or name the class id of its unconditional call in teacher.null_class"
            )
        return {**cond, "class_labels": torch.full_like(cond["class_labels"], self.null_class)}

    def guided(self, guidance_scale: float) -> VelocityField:
        """The field under classifier-free guidance; 1 = the field itself."""
        if guidance_scale == 1:
            return self.field
        if self.null_class is None:
            self.null({})  # the same refusal, before any work
        if not self.unconditional:
            raise InputError(
                f"{self.description} was trained on its teacher alone and never on an unconditional velocity; "
                "use guidance_scale: 1, or guide a teacher trained on data"
            )
        return Guided(self.field, self.null, guidance_scale)
