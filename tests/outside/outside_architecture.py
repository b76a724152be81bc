"""A teacher of somebody else's: another call, another condition. The velocity of points around a circle, exact.

Point k of K lies at angle 2 pi k / K; the network is told the angle, not the number, and takes the noise level first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.protocols import Cond


class Circle(ModelMixin, ConfigMixin):
    """v(x_t, t) of data N(radius (cos, sin), std^2), by angle; on average over the circle where there is none."""

    @register_to_config
    def __init__(self, points: int = 4) -> None:
        super().__init__()
        self.radius, self.std = nn.Parameter(torch.ones(())), nn.Parameter(torch.full((), 0.2))
        self.centred, self.scaled = nn.Identity(), nn.Identity()  # what others may look at

    def forward(self, noise_level: Tensor, points: Tensor, direction: Tensor) -> Tensor:
        """noise_level [B] in [0, 1], points [B, 2], direction [B, 2] -> [B, 2]."""
        t, mean = noise_level[:, None].to(points.dtype), self.radius * direction
        inside = self.centred(points - (1 - t) * mean)
        variance = ((1 - t) * self.std).square() + t.square()
        return self.scaled((t - (1 - t) * self.std.square()) / variance * inside - mean)


@dataclass(frozen=True)
class Angles:
    """Which point, as an angle; the numbers come along for networks that know classes."""

    count: int
    has_null: bool = True

    def collate(self, indices: Tensor, sizes: Tensor | None = None) -> Cond:
        angle = 2 * math.pi * indices / self.count
        return {"direction": torch.stack([angle.cos(), angle.sin()], dim=1), "class_labels": indices}

    def null(self, cond: Cond) -> Cond:
        nowhere = torch.full_like(cond["class_labels"], self.count)
        return {"direction": torch.zeros_like(cond["direction"]), "class_labels": nowhere}


@dataclass(frozen=True)
class Around:
    """Implements `protocols.Architecture`."""

    classes: tuple[type[nn.Module], ...] = (Circle,)

    def shape(self, config: dict[str, Any], path: Path) -> tuple[int, ...]:
        return (2,)

    def conditioning(self, config: dict[str, Any], path: Path, null_class: int | None) -> Angles:
        points = config.get("points")
        if not isinstance(points, int) or points < 1:
            raise InputError(f"{path}: points={points!r}; valid: a whole number from 1 on")
        return Angles(points)

    def layers(self, network: nn.Module) -> Sequence[str]:
        return ["centred", "scaled"]

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        found: Tensor = network(time / 1000, x_t, cond["direction"].to(x_t.dtype))
        return found


ARCHITECTURE = Around()
