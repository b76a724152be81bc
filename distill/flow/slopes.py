"""Options of recipes that move along the paths of a teacher, or of data, and differentiate a flow map along them."""

from contextlib import nullcontext
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.flow import autodiff
from distill.flow.guidance_options import GuidanceScale
from distill.flow.interpolants import like
from distill.flow.smooth_times import smooth_times, time_embeddings
from distill.protocols import Batch, Cond, Draw, Teacher, VelocityField


class PathOptions(BaseModel):
    """The options of a recipe that moves along the paths of a teacher, or of data."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    velocity: Literal["teacher", "data", "pairs"] = "teacher"
    """velocity v of the paths: the teacher's; or noise - data, of real data (data), which needs no teacher, or of the
    teacher's pairs (pairs), which are those of a rectified flow after reflow"""
    guidance_scale: GuidanceScale = 1.0
    """guidance scale of the teacher, which the student learns; 1: no guidance; [low, high]: it is an input"""

    @model_validator(mode="after")
    def _path_has_effect(self) -> Self:
        if self.velocity != "teacher" and self.guidance_scale != 1:
            raise ValueError(
                f"guidance_scale has no effect with velocity: {self.velocity}; remove it, or use velocity: teacher"
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(
            {"teacher": {"teacher", "data"}, "data": {"data"}, "pairs": {"teacher", "pairs"}}[self.velocity]
        )

    def guide(self, teacher: Teacher | None) -> VelocityField | None:
        """The guided teacher; None if the velocity is not that of a teacher."""
        return teacher.guided(self.guidance_scale) if self.velocity == "teacher" and teacher is not None else None

    def ends(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Data and noise between which the paths are, both [B, ...]."""
        if self.velocity == "pairs":
            assert batch.pairs is not None
            return batch.pairs.data, batch.pairs.noise
        assert batch.data is not None
        return batch.data, draw.normal("noise", batch.data)


class SlopeOptions(PathOptions):
    """The options of a recipe that differentiates its student along a velocity."""

    derivative: Literal["forward", "smooth", "central"] = "forward"
    """forward: exact; smooth: exact but for the network's embedding of t, which is differentiated without its ripple;
    central: finite differences, for networks without forward-mode derivatives"""
    h: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    """for central: half the distance between its two times, at most half of t - s; null: 0.01"""

    @model_validator(mode="after")
    def _slope_has_effect(self) -> Self:
        if self.derivative != "central" and self.h is not None:
            raise ValueError(
                f"h has no effect with derivative: {self.derivative}; remove it, or use derivative: central"
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"jvp"} if self.derivative != "central" else frozenset())

    def checked(self, flow_map: nn.Module) -> nn.Module:
        """The network. InputError if `derivative: smooth` cannot differentiate it."""
        if self.derivative == "smooth" and not time_embeddings(flow_map):
            raise InputError(
                "derivative: smooth has no effect on this network, which does not embed times from 0 to 1000 as "
                "diffusers does; use derivative: forward"
            )
        return flow_map

    def slope(self, flow_map: nn.Module, x_t: Tensor, t: Tensor, s: Tensor, v: Tensor, cond: Cond) -> Tensor:
        """Du: the derivative of u(x_t, t, s, cond) along (v, 1, 0) at times s < t [B], in the shape of x_t.

        Central differences stay within [s, 1]: near t = 1, their centre is slightly below t.
        """
        h = torch.minimum((t - s) / 2, torch.full_like(t, self.h or 0.01)).clamp(min=1e-4)
        middle = torch.maximum(torch.minimum(t, 1 - h), h) if self.derivative == "central" else t
        point = (x_t + like(middle - t, x_t) * v, middle, s)
        direction = (v, torch.ones_like(t), torch.zeros_like(t))
        if self.derivative == "central":
            return autodiff.jvp(lambda *p: flow_map(*p, cond), point, direction, method="central", step=h)
        with smooth_times(flow_map) if self.derivative == "smooth" else nullcontext():
            return autodiff.jvp(lambda *p: flow_map(*p, cond), point, direction)
