"""The second time of a flow map, as a network of its own: an embedding that is added to those of the first time.

This file is shipped inside student folders: it imports torch and diffusers only.
"""

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .guidance_input import GuidanceInput, scales


class SecondTime(ModelMixin, ConfigMixin):
    """The embedding [B, width] of t - s, for a network of the average velocity u(x_t, t, s).

    layers: the modules to whose outputs it is added: those of a pipeline that embed the time, as COMPONENT.MODULE.
    t - s enters as cos and sin of k pi/2 (t - s), k = 1 ... waves, which is smooth, for derivatives with respect to it.
    Older students, whose configs do not say how many waves, have 16. guidance_range: [low, high] of the guidance scales
    that the network takes as a further input; None: none.
    The last layer is zero at first, so u does not depend on s until it is trained, and neither on the guidance scale.
    """

    @register_to_config
    def __init__(
        self, width: int, layers: list[str], waves: int = 16, guidance_range: list[float] | None = None
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * waves, width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.guidance = None if guidance_range is None else GuidanceInput(guidance_range, width)

    def forward(self, difference: Tensor, guidance_scale: Tensor | float | None = None) -> Tensor:
        """t - s [B], guidance_scale a number or [B] -> [B, width], in the data type of the weights."""
        k = torch.arange(1, self.config.waves + 1, dtype=torch.float32, device=difference.device)
        angle = difference.float()[:, None] * k * (math.pi / 2)  # [B, waves]
        waves = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.hidden.weight.dtype)
        embedded: Tensor = self.out(nn.functional.silu(self.hidden(waves)))
        given = scales(self.config.guidance_range, guidance_scale, difference)
        return embedded if given is None or self.guidance is None else embedded + self.guidance(given)
