"""The guidance scale as an input of a network.

This file is shipped inside student folders: it imports torch only.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

WAVES = 4  # at most 2 pi radians from the lowest scale to the highest


class GuidanceInput(nn.Sequential):
    """The embedding [B, width] of a guidance scale from low to high. It is zero until it is trained.

    The scale enters as cos and sin of k pi/2 z, k = 1 ... 4, where z goes from 0 at the lowest scale to 1 at the
    highest.
    """

    def __init__(self, guidance_range: Sequence[float], width: int) -> None:
        super().__init__(nn.Linear(2 * WAVES, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self[2].weight)
        nn.init.zeros_(self[2].bias)
        self.low, self.high = guidance_range

    def forward(self, guidance_scale: Tensor) -> Tensor:
        """guidance_scale: [B]."""
        z = (guidance_scale.float() - self.low) / (self.high - self.low)
        k = torch.arange(1, WAVES + 1, dtype=torch.float32, device=z.device)
        angle = z[:, None] * k * (math.pi / 2)  # [B, WAVES]
        return super().forward(torch.cat([angle.cos(), angle.sin()], dim=1).to(self[0].weight.dtype))


class ClassesAndGuidance(nn.Embedding):
    """The embedding of (class_labels [B], guidance scales [B]): [B, width]."""

    def __init__(self, count: int, guidance_range: Sequence[float], width: int) -> None:
        super().__init__(count, width)
        self.guidance = GuidanceInput(guidance_range, width)

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        class_labels, guidance_scale = given
        embedded: Tensor = super().forward(class_labels) + self.guidance(guidance_scale)
        return embedded


def scales(guidance_range: Sequence[float] | None, given: Tensor | float | None, sample: Tensor) -> Tensor | None:
    """The guidance scales [B] for a network, whose range is None if it takes none. given: a number, or [B].

    ValueError if they are given to a network that takes none, or missing.
    """
    if guidance_range is None:
        if given is not None:
            raise ValueError("guidance_scale was given to a network that does not take one")
        return None
    if given is None:
        raise ValueError(f"this network needs guidance_scale, from {guidance_range[0]:g} to {guidance_range[1]:g}")
    return torch.as_tensor(given, dtype=torch.float32, device=sample.device).expand(sample.shape[0])
