"""Options of recipes that differentiate a flow map along the paths of a teacher, or of data."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from distill.flow import autodiff
from distill.flow.interpolants import like


class SlopeOptions(BaseModel):
    """The options of a recipe that differentiates its student along a velocity."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    velocity: Literal["teacher", "data"] = "teacher"
    """velocity v of the paths: the teacher's, or (data) noise - data, which needs no teacher"""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """guidance scale of the teacher, which the student learns; 1: no guidance"""
    derivative: Literal["forward", "central"] = "forward"
    """forward: exact; central: finite differences, if forward-mode derivatives are not supported or too noisy"""
    h: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    """for central: half the distance between its two times, at most half of t - s; null: 0.01"""

    @model_validator(mode="after")
    def _slope_has_effect(self) -> Self:
        if self.velocity == "data" and self.guidance_scale != 1:
            raise ValueError("guidance_scale has no effect with velocity: data; remove it, or use velocity: teacher")
        if self.derivative == "forward" and self.h is not None:
            raise ValueError("h has no effect with derivative: forward; remove it, or use derivative: central")
        return self

    @property
    def needs(self) -> frozenset[str]:
        needs = {"data"} | ({"teacher"} if self.velocity == "teacher" else set())
        return frozenset(needs | ({"jvp"} if self.derivative == "forward" else set()))

    def slope(
        self, flow_map: autodiff.Function, x_t: Tensor, t: Tensor, s: Tensor, v: Tensor, cond: Mapping[str, Tensor]
    ) -> Tensor:
        """Du: the derivative of u(x_t, t, s, cond) along (v, 1, 0) at times s < t [B], in the shape of x_t.

        Central differences stay within [s, 1]: near t = 1, their centre is slightly below t.
        """
        h = torch.minimum((t - s) / 2, torch.full_like(t, self.h or 0.01)).clamp(min=1e-4)
        middle = t if self.derivative == "forward" else torch.maximum(torch.minimum(t, 1 - h), h)
        point = (x_t + like(middle - t, x_t) * v, middle, s)
        direction = (v, torch.ones_like(t), torch.zeros_like(t))
        return autodiff.jvp(lambda *p: flow_map(*p, cond), point, direction, method=self.derivative, step=h)
