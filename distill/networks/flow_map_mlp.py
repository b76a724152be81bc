"""An MLP that knows two times: a flow map over vectors.

This file is shipped inside student folders: it imports torch and diffusers only.
"""

import functools

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .velocity_mlp import VelocityMLP


class FlowMapMLP(VelocityMLP):
    """u(x_t, t, s, class) of the linear path, the average velocity from t to s: VelocityMLP with t - s as a further
    input, to which it is blind until it is trained.
    """

    # diffusers reads the arguments off the signature
    @functools.wraps(VelocityMLP.__init__)  # type: ignore[misc]
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.gap = nn.Linear(self.num_times, self.config.width)
        nn.init.zeros_(self.gap.weight)
        nn.init.zeros_(self.gap.bias)

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        target_timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        guidance_scale: Tensor | float | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample [B, dim], timestep = 1000 t, target_timestep = 1000 s (numbers or [B]) -> velocity [B, dim]."""
        hidden = self.first(sample, timestep, class_labels, guidance_scale)
        hidden = hidden + self.gap(self.times(sample, torch.as_tensor(timestep) - torch.as_tensor(target_timestep)))
        velocity = self.layers[1:](hidden)
        return UNet2DOutput(sample=velocity) if return_dict else (velocity,)
