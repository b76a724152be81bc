"""Fields that wrap a field: guidance, change of schedule, call counting."""

from collections.abc import Callable

import torch
from torch import Tensor

from distill.interpolants import Interpolant, like
from distill.protocols import Cond, VelocityField


class Guided:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): v(null) + scale (v(cond) - v(null)).

    Scale 1 calls the field once and is bitwise the field; any other scale is ONE call of 2B rows, cond first.
    """

    def __init__(self, field: VelocityField, null: Callable[[Cond], Cond], guidance_scale: float) -> None:
        self.field, self.null, self.guidance_scale = field, null, guidance_scale
        self.interpolant, self.t_range = field.interpolant, field.t_range

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.guidance_scale == 1:
            return self.field(x_t, t, cond)
        like(t, x_t)
        null = self.null(cond)
        both = {name: torch.cat([value, null[name]]) for name, value in cond.items()}
        v_cond, v_null = self.field(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return v_null + self.guidance_scale * (v_cond - v_null)
