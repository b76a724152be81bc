"""Two U-Nets, a velocity of the linear path and its acceleration.

This file is shipped inside student folders: it imports torch and diffusers only.
"""

import functools

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from .velocity_unet import VelocityUNet2DModel


class AccelerationUNet2DModel(VelocityUNet2DModel):
    """A VelocityUNet2DModel, v(x_t, t, class), or with path "linear" a UNet2DModel of the linear path, and a second one
    beside it, a(x_t, t, class | v), of the linear path and on twice the channels: those of x_t, then those of v.
    """

    # diffusers reads the arguments off the signature
    @functools.wraps(VelocityUNet2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        both = 2 * self.config.in_channels
        self.acceleration = VelocityUNet2DModel.from_config(
            self.config, path="linear", prediction="velocity", alphas_cumprod=None, in_channels=both
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        velocity: Tensor | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample [B, C, H, W], timestep = 1000 t (a number or [B]), velocity that at t = 1 like sample, or None ->
        acceleration or velocity like sample.
        """
        if velocity is None:
            return super().forward(sample, timestep, class_labels, return_dict)
        return self.acceleration(torch.cat([sample, velocity], dim=1), timestep, class_labels, return_dict)
