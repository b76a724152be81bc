"""Options of recipes that train on data alone, and whose students guide themselves."""

from collections.abc import Callable
from typing import Annotated, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.flow.interpolants import like
from distill.protocols import Cond, Init

Share = Annotated[float, Field(ge=0, lt=1)]
PathTime = Annotated[float, Field(ge=0, le=1)]


class OwnGuidanceOptions(BaseModel):
    """The guidance of MeanFlow for training on data alone (Geng et al. 2025, arXiv 2505.13447, section 4.2).

    The velocity noise - data of a sample is replaced by
        omega (noise - data) + kappa u(x_t, t, t, cond) + (1 - omega - kappa) u(x_t, t, t, null condition).
    A student that learns it at s = t has the velocity of a teacher that is guided with the scale omega / (1 - kappa).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    omega: PositiveFloat | None = None
    """guidance for velocity: data, with the scale omega / (1 - kappa), which the student learns; null: no guidance"""
    kappa: Share | None = None
    """weight of the student's own velocity in the guided one; null: 0"""
    guided_from: PathTime | None = None
    """least t at which the velocity is guided; null: 0"""
    guided_to: PathTime | None = None
    """greatest t at which the velocity is guided; null: 1"""
    label_dropout: Share = 0.0
    """fraction of the batch whose condition is dropped, so that omega has a null condition to use; those have s = t"""

    @model_validator(mode="after")
    def _own_guidance_has_effect(self) -> Self:
        if self.omega is None:
            options = ("kappa", "guided_from", "guided_to", "label_dropout")
            if found := [name for name in options if name in self.model_fields_set]:
                raise ValueError(f"{', '.join(found)}: no effect without omega; remove them, or set omega")
            return self
        if self.omega == 1 and not self.kappa:
            raise ValueError("omega: 1 without kappa is no guidance; remove it, or set kappa or another omega")
        if self.label_dropout == 0:
            raise ValueError("omega needs a null condition that is trained; set label_dropout above 0, such as 0.1")
        high = 1 if self.guided_to is None else self.guided_to
        if (self.guided_from or 0) >= high:
            raise ValueError(f"guided_from={self.guided_from or 0} must be below guided_to={high}")
        return self

    def null_of(self, init: Init) -> Callable[[Cond], Cond]:
        """Makes the null condition. InputError if omega is set and the networks are unconditional."""
        if self.omega is not None and not init.conditioning.collate(torch.zeros(1).long()):
            raise InputError("omega has no effect without classes; remove it, or give labelled data")
        return init.null

    def own_guided(
        self, student: nn.Module, x_t: Tensor, t: Tensor, v: Tensor, cond: Cond, null: Cond, dropped: Tensor
    ) -> Tensor:
        """The guided velocity, without gradients; v [B, ...] outside the interval, and where the condition is dropped.

        dropped: [B] bool. The student is called once, or twice with kappa.
        """
        assert self.omega is not None
        kappa, high = self.kappa or 0.0, 1.0 if self.guided_to is None else self.guided_to
        with torch.no_grad():
            guided = self.omega * v + (1 - self.omega - kappa) * student(x_t, t, t, null)
            if kappa:
                guided = guided + kappa * student(x_t, t, t, cond)
        inside = (t >= (self.guided_from or 0.0)) & (t <= high) & ~dropped
        return torch.where(like(inside, v), guided, v)
